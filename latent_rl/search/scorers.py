"""Scores of candidates: what a search prefers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from latent_rl.eval.answering import Row
from latent_rl.rewards import RewardFunction, reward_name, score_rows
from latent_rl.search.candidates import Candidate

__all__ = ["CallableScore", "MeanLogprob", "RewardScore", "Scorer"]


class Scorer(Protocol):
    """Says how good candidates are."""

    @property
    def name(self) -> str:
        """What results say candidates were chosen by."""
        ...

    def __call__(self, rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[float]:
        """One number per (row, candidate), higher is better; NaN where there is none."""
        ...


class RewardScore:
    """The weighted sum of reward functions; NaN where one failed or none applies.

    Choosing by the reward that is reported afterwards measures an oracle, not the policy: say so.
    """

    def __init__(
        self, functions: Sequence[RewardFunction], weights: Sequence[float] | None = None
    ) -> None:
        """``weights``: of the functions; None for 1 each."""
        if not functions:
            raise ValueError("RewardScore: functions must not be empty")
        self._functions, self._weights = list(functions), weights
        self.name = "reward " + " + ".join(map(reward_name, functions))

    def __call__(self, rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[float]:
        """See :class:`Scorer`."""
        if not candidates:
            return []
        texts = [candidate.answer.text for candidate in candidates]
        ids = [candidate.answer.tokens for candidate in candidates]
        return list(score_rows(self._functions, rows, texts, ids, weights=self._weights).rewards)


class MeanLogprob:
    """Mean log-probability of a candidate's codes; needs no reward.

    A mean, because a sum prefers short answers.
    """

    name = "mean log-probability of codes"

    def __call__(self, rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[float]:
        """See :class:`Scorer`."""
        return [candidate.mean_logprob for candidate in candidates]


class CallableScore:
    """Any function of a row and a candidate."""

    def __init__(self, function: Callable[[Row, Candidate], float], name: str) -> None:
        self._function, self.name = function, name

    def __call__(self, rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[float]:
        """See :class:`Scorer`."""
        return [
            float(self._function(row, candidate))
            for row, candidate in zip(rows, candidates, strict=True)
        ]
