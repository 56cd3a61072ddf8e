"""Who answers prompts in an evaluation: one protocol for policies, base models and searches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from latent_rl.ops.seeds import row_seeds

__all__ = ["Answer", "Answerer", "Row", "Sampling", "answer_seeds"]

Row: TypeAlias = Mapping[str, Any]
"""An RL row: ``prompt``, ``images`` (or ``image``) and the columns that rewards read."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: of the actions, codes or tokens; 0 takes the most likely at every step.
        max_new_tokens: longest answer.
    """

    temperature: float = 1.0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"Sampling: temperature must be >= 0, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"Sampling: max_new_tokens must be >= 1, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt.

    Attributes:
        text: without special tokens.
        tokens: ids of the answer, its end token included.
        codes: the latent action behind each token; empty for models without codes.
        finished: an end token closed the answer, not the length limit.
        spent_tokens: tokens generated to find this answer; more than ``len(tokens)`` for a search
            that discards candidates. None means ``len(tokens)``.
    """

    text: str
    tokens: tuple[int, ...] = ()
    codes: tuple[int, ...] = ()
    finished: bool = True
    spent_tokens: int | None = None

    @property
    def cost(self) -> int:
        """Tokens generated for it, those of discarded candidates included."""
        return len(self.tokens) if self.spent_tokens is None else self.spent_tokens


class Answerer(Protocol):
    """Something that answers prompts: a latent policy, a base model, a search over either.

    What a new one must keep to, so that results can be compared:

    - An answer depends on its row, its seed and ``sampling`` alone, not on the rows beside it, so
      that a subset of the prompts gives the same answers.
    - With ``sampling.temperature == 0`` the seeds are ignored.
    - Rewards are not seen: whoever chooses by a reward is told it when made, and says so in
      ``details``. Everything generated on the way is counted in ``Answer.spent_tokens``.

    Attributes:
        name: what tables and reports call it, such as "latent policy".
        num_codes: K, or None for models without codes.
        details: plain values that tell this one from others of the same name: checkpoint, number
            of candidates, top-k. They are kept with the results and compared between runs.
    """

    @property
    def name(self) -> str: ...

    @property
    def num_codes(self) -> int | None: ...

    @property
    def details(self) -> Mapping[str, Any]: ...

    def answer(self, rows: Sequence[Row], seeds: Tensor, sampling: Sampling) -> list[list[Answer]]:
        """M answers for each of P rows.

        Args:
            rows: P RL rows.
            seeds: int64 [P, M] on the CPU, one per answer; see :func:`answer_seeds`.
            sampling: temperature and length.

        Returns:
            P lists of M answers, in the order of ``seeds``.
        """
        ...


def answer_seeds(seed: int, split: str, prompts: range, samples: int) -> Tensor:
    """Seeds int64 [P, M] of the prompts with these indices in a split.

    A seed depends on the evaluation's seed, the split's name, the prompt's index and the sample's
    index alone: neither batching nor how many prompts or samples there are changes the others'.
    """
    rows = []
    for index in prompts:
        digest = hashlib.blake2b(f"{seed}/{split}/{index}".encode(), digest_size=8).digest()
        rows.append(row_seeds(int.from_bytes(digest, "big"), samples))
    return torch.stack(rows) if rows else torch.empty(0, samples, dtype=torch.int64)
