"""Intervals, diversity and code usage against numbers worked out by hand."""

import math

import pytest
import torch

from latent_rl.eval.codes import code_usage
from latent_rl.eval.diversity import distinct_n, distinct_responses
from latent_rl.eval.intervals import bootstrap_interval, t_interval


def test_t_interval_of_three_values() -> None:
    # mean 2, sd 1, standard error 1/sqrt(3), quantile 4.303 for two degrees of freedom
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert str(interval) == "2.000 ± 2.484"


def test_one_value_has_no_interval() -> None:
    assert math.isnan(t_interval([0.5]).low)
    assert str(t_interval([0.5])) == "0.500"


@pytest.mark.parametrize("interval", [t_interval, bootstrap_interval])
@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_interval_refuses_nothing_and_nan(interval, values) -> None:
    with pytest.raises(ValueError, match="values must"):
        interval(values)


def test_bootstrap_interval_brackets_the_mean_and_repeats() -> None:
    values = [0.0] * 30 + [1.0] * 70
    first, second = bootstrap_interval(values), bootstrap_interval(values)
    assert first == second
    assert first.low < 0.7 < first.high
    # The standard error of a 0.7 share over 100 is 0.046.
    assert first.half_width == pytest.approx(1.96 * 0.0458, rel=0.15)


def test_distinct_responses_counts_different_answers() -> None:
    assert distinct_responses([["a", "a", "b", "c"], ["x", "x", "x", "x"]]) == (0.75 + 0.25) / 2


def test_distinct_n_counts_different_ngrams() -> None:
    # bigrams: "a b", "b c", "a b" -> 2 of 3
    assert distinct_n([["a b c", "a b"]], 2) == pytest.approx(2 / 3)
    assert distinct_n([["a"]], 2) == 0


def test_empty_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="groups"):
        distinct_responses([[]])


def test_code_usage_of_a_half_used_codebook() -> None:
    usage = code_usage(torch.tensor([[0, 1, -1], [1, 0, -1]]), 4)
    assert usage.perplexity == pytest.approx(2)
    assert (usage.used, usage.share) == (2, 0.5)
    assert usage.counts.tolist() == [2, 2, 0, 0]


def test_code_usage_refuses_codes_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"below num_codes \(4\), got 4"):
        code_usage(torch.tensor([4]), 4)
