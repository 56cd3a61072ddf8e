"""Votes among answers, and the middle one of code sequences."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Hashable, Sequence

import numpy as np

__all__ = ["edit_distance", "last_number", "medoid", "normalised", "weighted_majority"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

AnswerOf = Callable[[str], Hashable]
"""What of a text is voted for."""


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (the rule of SQuAD's metric)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def last_number(text: str) -> str | None:
    """The last number of a text as it is written, without thousands separators; None without."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def weighted_majority(
    votes: Sequence[Hashable], weights: Sequence[float], scores: Sequence[float]
) -> int:
    """Index of the candidate that speaks for the answer with the most weight.

    Answers tie-break by the best score among their voters, then by the earliest voter. The
    winner's speaker is its best scored voter, the earliest of equals. ``None`` votes abstain,
    unless all do: then all vote for the same thing. With weights of 1 this is self-consistency
    (arXiv 2203.11171).

    Args:
        votes: answer of each candidate.
        weights: of each vote, >= 0 and finite.
        scores: of each candidate; NaN counts as the lowest.

    Raises:
        ValueError: without votes, for lengths that differ, or for a weight below 0 or not finite.
    """
    if not votes:
        raise ValueError("weighted_majority: votes must not be empty")
    if not len(votes) == len(weights) == len(scores):
        raise ValueError(
            f"weighted_majority: votes, weights and scores must be equally many, "
            f"got {len(votes)}, {len(weights)}, {len(scores)}"
        )
    if not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"weighted_majority: weights must be finite and >= 0, got {weights}")
    voters = [i for i, vote in enumerate(votes) if vote is not None] or list(range(len(votes)))
    rank = [score if score == score else -float("inf") for score in scores]
    totals: dict[Hashable, float] = {}
    speakers: dict[Hashable, int] = {}
    for index in voters:
        vote = votes[index]
        totals[vote] = totals.get(vote, 0.0) + weights[index]
        if vote not in speakers or rank[index] > rank[speakers[vote]]:
            speakers[vote] = index
    # Dictionaries keep the order of the first voters, and max takes the first of equals.
    winner = max(totals, key=lambda vote: (totals[vote], rank[speakers[vote]]))
    return speakers[winner]


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Insertions, deletions and substitutions that turn one sequence into the other
    (Levenshtein)."""
    if len(first) < len(second):
        first, second = second, first
    wanted = np.asarray(second)
    row = np.arange(len(second) + 1)
    steps = np.arange(len(second) + 1)
    for index, item in enumerate(first):
        here = np.empty_like(row)
        here[0] = index + 1
        here[1:] = np.minimum(row[1:] + 1, row[:-1] + (wanted != item))
        # Insertions run along the row: d[j] = min over i <= j of d[i] + (j - i).
        row = np.minimum.accumulate(here - steps) + steps
    return int(row[-1])


def medoid(sequences: Sequence[Sequence[int]]) -> int:
    """Index of the sequence with the least summed edit distance to all others; the earliest of
    equals.

    Raises:
        ValueError: without sequences.
    """
    if not sequences:
        raise ValueError("medoid: sequences must not be empty")
    count = len(sequences)
    sums = [0] * count
    for i in range(count):
        for j in range(i):
            distance = edit_distance(sequences[i], sequences[j])
            sums[i] += distance
            sums[j] += distance
    return min(range(count), key=sums.__getitem__)
