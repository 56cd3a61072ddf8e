"""Ways to choose one of a prompt's candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from latent_rl.eval.answering import Row
from latent_rl.search.candidates import Candidate
from latent_rl.search.scorers import Scorer
from latent_rl.search.voting import AnswerOf, medoid, normalised, weighted_majority

__all__ = ["BestScore", "Chooser", "CodeMedoid", "Majority", "softmax_weights"]


class Chooser(Protocol):
    """Picks a candidate for each row."""

    @property
    def name(self) -> str:
        """Of the method, such as "best"."""
        ...

    @property
    def details(self) -> Mapping[str, Any]:
        """Plain values that results should tell: what was chosen by."""
        ...

    def choose(self, rows: Sequence[Row], groups: Sequence[Sequence[Candidate]]) -> list[int]:
        """Index of the chosen candidate in each group; groups[i] belongs to rows[i]."""
        ...


@dataclass(frozen=True)
class BestScore:
    """The candidate of the highest score (best-of-n), the earliest of equals.

    Attributes:
        scorer: of candidates; those without a score are never chosen.
    """

    scorer: Scorer
    name: str = "best"

    @property
    def details(self) -> Mapping[str, Any]:
        """See :class:`Chooser`."""
        return {"chosen_by": self.scorer.name}

    def choose(self, rows: Sequence[Row], groups: Sequence[Sequence[Candidate]]) -> list[int]:
        """See :class:`Chooser`.

        Raises:
            RuntimeError: when no candidate of a row has a score.
        """
        chosen = []
        for scores in _scores(self.scorer, rows, groups):
            scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
            if not scored:
                raise RuntimeError(
                    f"BestScore: {self.scorer.name} scored none of {len(scores)} candidates"
                )
            chosen.append(max(scored, key=scores.__getitem__))
        return chosen


def softmax_weights(scores: Sequence[float]) -> list[float]:
    """exp(score - highest): weights of votes in (0, 1]; 0 without a score."""
    known = [score for score in scores if not math.isnan(score)]
    top = max(known, default=0.0)
    return [0.0 if math.isnan(score) else math.exp(score - top) for score in scores]


def _equal_weights(scores: Sequence[float]) -> list[float]:
    return [1.0] * len(scores)


@dataclass(frozen=True)
class Majority:
    """A vote over normalised answers (self-consistency), ties by score.

    Attributes:
        scorer: breaks ties, and weighs votes where ``weights_of`` says so.
        answer_of: what of a text is voted for; None abstains.
        weights_of: scores of a row's candidates to weights >= 0; by default every vote counts 1.
        name: of the method.
    """

    scorer: Scorer
    answer_of: AnswerOf = normalised
    weights_of: Callable[[Sequence[float]], Sequence[float]] = _equal_weights
    name: str = "majority"

    @property
    def details(self) -> Mapping[str, Any]:
        """See :class:`Chooser`."""
        weighed = "ties" if self.weights_of is _equal_weights else "weights"
        return {"chosen_by": f"vote, {weighed} by {self.scorer.name}"}

    def choose(self, rows: Sequence[Row], groups: Sequence[Sequence[Candidate]]) -> list[int]:
        """See :class:`Chooser`."""
        chosen = []
        for group, scores in zip(groups, _scores(self.scorer, rows, groups), strict=True):
            votes = [self.answer_of(candidate.answer.text) for candidate in group]
            chosen.append(weighted_majority(votes, self.weights_of(scores), scores))
        return chosen


@dataclass(frozen=True)
class CodeMedoid:
    """The candidate whose codes lie in the middle: least summed edit distance to the others.

    A vote for free text, where no two answers are equal; it asks no reward.
    """

    name: str = "medoid"

    @property
    def details(self) -> Mapping[str, Any]:
        """See :class:`Chooser`."""
        return {"chosen_by": "edit distance of codes"}

    def choose(self, rows: Sequence[Row], groups: Sequence[Sequence[Candidate]]) -> list[int]:
        """See :class:`Chooser`.

        Raises:
            ValueError: for candidates without codes.
        """
        for group in groups:
            if any(c.answer.tokens and not c.answer.codes for c in group):
                raise ValueError(
                    "CodeMedoid: candidates must have codes; a token model's have none"
                )
        return [medoid([candidate.answer.codes for candidate in group]) for group in groups]


def _scores(
    scorer: Scorer, rows: Sequence[Row], groups: Sequence[Sequence[Candidate]]
) -> list[list[float]]:
    """Scores by group, from one call."""
    flat = [candidate for group in groups for candidate in group]
    each = [row for row, group in zip(rows, groups, strict=True) for _ in group]
    scores = iter(scorer(each, flat))
    return [[next(scores) for _ in group] for group in groups]
