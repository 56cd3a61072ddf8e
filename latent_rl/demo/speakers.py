"""Who answers in an evaluation: a token-level model, or a latent policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from latent_rl.data import render_prompts
from latent_rl.models import LatentActionModel

__all__ = ["MAX_NEW_TOKENS", "Answers", "LatentSpeaker", "Speaker", "TokenSpeaker"]

MAX_NEW_TOKENS = 28


@dataclass(frozen=True)
class Answers:
    """Texts of the answers; codes [B, T] (-1 where none) of a latent policy, or None."""

    texts: list[str]
    codes: Tensor | None


class Speaker(Protocol):
    """Answers prompts."""

    def answer(self, rows: Sequence[Any], *, temperature: float, seed: int) -> Answers:
        """One answer per RL row, sampled at ``temperature``, or the likeliest at 0."""
        ...


class TokenSpeaker:
    """Samples tokens from the vocabulary."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model.eval(), processor

    def answer(self, rows: Sequence[Any], *, temperature: float, seed: int) -> Answers:
        """See :class:`Speaker`."""
        inputs = render_prompts(self._processor, rows)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature > 0
            else {"do_sample": False}
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            out = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **sampling)
        completions = out[:, inputs["input_ids"].shape[1] :]
        return Answers(_texts(self._processor, completions), None)


class LatentSpeaker:
    """Samples codes; the world model says the likeliest token under each."""

    def __init__(self, model: LatentActionModel, processor: Any) -> None:
        self._model, self._processor = model.eval(), processor

    def answer(self, rows: Sequence[Any], *, temperature: float, seed: int) -> Answers:
        """See :class:`Speaker`."""
        out = self._model.generate(
            render_prompts(self._processor, rows),
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=temperature,
            seed=seed,
        )
        return Answers(_texts(self._processor, out.completion_ids), out.codes)


def _texts(processor: Any, completions: Tensor) -> list[str]:
    texts: list[str] = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
    return texts
