"""Votes, medoids, edit distances and unbiased estimates, by hand and by brute force."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_rl.search import (
    best_at_k,
    edit_distance,
    last_number,
    medoid,
    normalised,
    pass_at_k,
    softmax_weights,
    weighted_majority,
)

NAN = math.nan


class TestVotes:
    @pytest.mark.parametrize(
        ("votes", "weights", "scores", "winner"),
        [
            (["a", "b", "b"], [1, 1, 1], [9, 0, 1], 2),  # majority; its best scored voter speaks
            (["a", "b", "b", "a"], [1, 1, 1, 1], [0, 3, 1, 2], 1),  # tie: the best score decides
            (["a", "b", "b", "a"], [1, 1, 1, 1], [2, 2, 2, 2], 0),  # still tied: the earliest
            (["a", "b", "b"], [3, 1, 1], [0, 0, 0], 0),  # weights outvote numbers
            ([None, None, "b"], [1, 1, 1], [5, 5, 0], 2),  # None abstains
            ([None, None], [1, 1], [0, 1], 1),  # unless all do
            (["a", "a", "b"], [1, 1, 1], [NAN, 0, 9], 1),  # no score is the lowest score
        ],
    )
    def test_by_hand(self, votes, weights, scores, winner) -> None:
        assert weighted_majority(votes, weights, scores) == winner

    def test_errors_name_the_argument(self) -> None:
        with pytest.raises(ValueError, match="votes must not be empty"):
            weighted_majority([], [], [])
        with pytest.raises(ValueError, match="equally many, got 2, 1, 2"):
            weighted_majority(["a", "b"], [1], [0, 0])
        with pytest.raises(ValueError, match="weights must be finite and >= 0"):
            weighted_majority(["a"], [-1], [0])

    def test_weights_of_scores(self) -> None:
        weights = softmax_weights([math.log(4.0), math.log(2.0), NAN])
        assert weights == pytest.approx([1.0, 0.5, 0.0])

    def test_answers_are_compared_without_case_punctuation_and_articles(self) -> None:
        assert normalised("  The Red house!") == normalised("red  house.") == "red house"
        assert normalised("Athena") == "athena"

    def test_the_last_number(self) -> None:
        assert last_number("1 of 2, so 1,234.5.") == "1234.5"
        assert last_number("-3") == "-3"
        assert last_number("none") is None


def naive_distance(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    if not first or not second:
        return len(first) + len(second)
    return min(
        naive_distance(first[1:], second) + 1,
        naive_distance(first, second[1:]) + 1,
        naive_distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


CODES = st.lists(st.integers(0, 2), max_size=5).map(tuple)


class TestCodes:
    @given(CODES, CODES)
    def test_edit_distance_equals_its_definition(self, first, second) -> None:
        assert edit_distance(first, second) == naive_distance(first, second)

    def test_edit_distance_by_hand(self) -> None:
        kitten, sitting = ([ord(c) for c in word] for word in ("kitten", "sitting"))
        assert edit_distance(kitten, sitting) == 3

    def test_the_medoid_lies_in_the_middle(self) -> None:
        # Sums: 1 + 2 = 3, 1 + 1 = 2, 2 + 1 = 3.
        assert medoid([(1, 1, 1, 1), (1, 1, 1, 2), (1, 1, 2, 2)]) == 1
        assert medoid([(1,), (2,)]) == 0
        with pytest.raises(ValueError, match="must not be empty"):
            medoid([])


class TestEstimates:
    @pytest.mark.parametrize("correct", range(6))
    @pytest.mark.parametrize("k", range(1, 6))
    def test_pass_at_k_counts_subsets(self, correct, k) -> None:
        drawn = [index < correct for index in range(5)]
        subsets = list(itertools.combinations(drawn, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(5, correct, k) == pytest.approx(expected)

    @given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.data())
    def test_best_at_k_is_the_mean_over_subsets(self, scores, data) -> None:
        k = data.draw(st.integers(1, len(scores)))
        expected = statistics.fmean(max(s) for s in itertools.combinations(scores, k))
        assert best_at_k(scores, k) == pytest.approx(expected, abs=1e-9)

    def test_scores_of_0_and_1_give_pass_at_k(self) -> None:
        assert best_at_k([0, 1, 0, 1, 0], 2) == pytest.approx(pass_at_k(5, 2, 2))

    def test_impossible_k_and_scores_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"pass_at_k: k must be in \[1, 4\]"):
            pass_at_k(4, 1, 5)
        with pytest.raises(ValueError, match=r"correct must be in \[0, 4\]"):
            pass_at_k(4, 5, 1)
        with pytest.raises(ValueError, match=r"best_at_k: k must be in \[1, 2\]"):
            best_at_k([1.0, 2.0], 0)
        with pytest.raises(ValueError, match="finite"):
            best_at_k([1.0, NAN], 1)
