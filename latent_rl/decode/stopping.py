"""Stop strings: texts that end a request, looked for in what it has said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latent_rl.decode.output import Results

__all__ = ["StopStrings"]


class StopStrings:
    """Finds the token that completes a stop string."""

    def __init__(self, strings: Sequence[str], tokenizer: Any | None) -> None:
        """Without strings nothing is ever found.

        Raises:
            ValueError: for an empty string.
        """
        if any(not string for string in strings):
            raise ValueError("Decoder: stop_strings must not be empty")
        self._strings, self._tokenizer = tuple(strings), tokenizer
        self.matched = False

    def cut(self, results: Results, request: int, known: int, said: int) -> int:
        """Tokens of a request up to the end of its first stop string, or ``said``.

        ``matched`` tells whether one was found. The first ``known`` tokens are known to have none.
        """
        self.matched = False
        if not self._strings:
            return said
        tokens = results.ids[request, :said, 0].tolist()
        for length in range(known + 1, said + 1):
            text = self._tokenizer.decode(tokens[:length])  # type: ignore[union-attr]
            if any(string in text for string in self._strings):
                self.matched = True
                return length
        return said
