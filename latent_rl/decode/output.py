"""What the engine returns, and the buffers it writes into, one row per request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latent_rl.models import LatentGeneration

__all__ = ["FINISH_REASONS", "DecodeError", "DecodeOutput", "Piece", "Results", "Said"]

FINISH_REASONS = ("stop", "stop_string", "length", "failed", "unfinished")


class DecodeOutput(NamedTuple):
    """Completions in the order of the requests (prompt by prompt, its generations together).

    Attributes:
        generation: ids, mask, codes, log-probabilities, entropies and the trace, as from
            ``LatentActionModel.generate``; rows that failed are all masked.
        finish_reasons: per row one of ``FINISH_REASONS``: an end-of-sequence token ("stop"), a
            stop string, the length limit, a prompt that could not be read ("failed"), or a run
            that was interrupted before the row ended ("unfinished").
    """

    generation: LatentGeneration
    finish_reasons: tuple[str, ...]


class DecodeError(RuntimeError):
    """Some prompts could not be read; the other requests are done.

    Attributes:
        errors: by request, what its prompt raised.
        output: everything, with the failed rows masked.
    """

    def __init__(self, errors: Mapping[int, Exception], output: DecodeOutput) -> None:
        """Name the first error and how many there are."""
        self.errors, self.output = dict(errors), output
        request, first = next(iter(errors.items()))
        super().__init__(
            f"Decoder: {len(errors)} of {len(output.finish_reasons)} requests failed; "
            f"request {request}: {type(first).__name__}: {first}. The others are in .output"
        )


class Piece(NamedTuple):
    """New tokens of one request, from :meth:`Decoder.stream`.

    Attributes:
        request: its row.
        tokens, codes: what is new.
        finish_reason: of a request's last piece, else None.
    """

    request: int
    tokens: tuple[int, ...]
    codes: tuple[int, ...]
    finish_reason: str | None


@dataclass
class Results:
    """Buffers [R + 1, ...] indexed by request; the last row takes what idle slots write.

    Every step's tokens, codes and states go straight to their final place.

    Attributes:
        ids: int64 [R + 1, T, 2], token and code.
        numbers: float32 [R + 1, T, 3], log-probability, full log-probability, entropy.
        hidden: [R + 1, P + T - 1, H], or None.
        lengths: tokens said by each request that ended.
        reasons: how it ended.
    """

    ids: Tensor
    numbers: Tensor
    hidden: Tensor | None
    lengths: list[int]
    reasons: list[str]

    @classmethod
    def empty(
        cls,
        requests: int,
        steps: int,
        *,
        hidden: tuple[int, int, torch.dtype] | None,
        device: torch.device,
    ) -> Results:
        """R requests of at most T steps.

        Args:
            requests: R.
            steps: T.
            hidden: (longest prompt P, H, dtype) to keep states, or None.
            device: of all buffers.
        """
        states = None
        if hidden is not None:
            prompt, width, dtype = hidden
            shape = (requests + 1, prompt + steps - 1, width)
            states = torch.zeros(shape, dtype=dtype, device=device)
        return cls(
            ids=torch.full((requests + 1, steps, 2), -1, dtype=torch.int64, device=device),
            numbers=torch.zeros(requests + 1, steps, 3, device=device),
            hidden=states,
            lengths=[0] * requests,
            reasons=["unfinished"] * requests,
        )

    @property
    def spare(self) -> int:
        """The row of idle slots."""
        return self.ids.shape[0] - 1

    def record(self, said: Said, requests: Tensor, at: slice, *, decoded: bool, idle: bool) -> None:
        """Write what the slots ``at`` said.

        Args:
            said: the step's outputs.
            requests: int64 [n], the slots' rows.
            at: n slots.
            decoded: the states belong to new positions, not to the prompts' last.
            idle: some of the slots may have said nothing.
        """
        columns = said.columns[at]
        if idle:
            requests = requests.masked_fill(columns < 0, self.spare)
            columns = columns.clamp_min(0)
        self.ids[requests, columns] = said.ids[at]
        self.numbers[requests, columns] = said.numbers[at]
        if decoded and self.hidden is not None:
            # Column P - 1 + s holds the state behind token s.
            first = self.hidden.shape[1] - self.ids.shape[1]
            self.hidden[requests, columns + first] = said.hidden[at].to(self.hidden.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        tensors = [self.ids, self.numbers, *([] if self.hidden is None else [self.hidden])]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Said:
    """What one step says, [slots, ...]; the same storage at every step.

    Attributes:
        ids: int64 [slots, 2], token and code (-1 without a policy).
        numbers: float32 [slots, 3], log-probability, full log-probability, entropy.
        hidden: [slots, H], the trunk's state behind them.
        columns: int64 [slots], how many tokens the slot had said before; -1 when it was idle.
    """

    ids: Tensor
    numbers: Tensor
    hidden: Tensor
    columns: Tensor

    @classmethod
    def empty(cls, slots: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Said:
        """Storage for H-wide states of a dtype."""
        return cls(
            ids=torch.full((slots, 2), -1, dtype=torch.int64, device=device),
            numbers=torch.zeros(slots, 3, device=device),
            hidden=torch.zeros(slots, hidden, dtype=dtype, device=device),
            columns=torch.zeros(slots, dtype=torch.int64, device=device),
        )
