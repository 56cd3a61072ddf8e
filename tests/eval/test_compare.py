"""Comparisons: pairing, differences, and what may not be compared."""

import dataclasses

import pytest

from latent_rl.eval import EvaluationSettings, compare, evaluate
from tests.eval.evaluations import (
    LengthEncoder,
    WordAnswerer,
    names_colour,
    rows,
    small_evaluation,
)


def row(comparison, metric: str, split: str = "test"):
    return next(r for r in comparison.splits[split] if r.metric == metric)


def test_a_better_run_shows_in_paired_differences() -> None:
    found = compare([small_evaluation(0.2), small_evaluation(0.9)])
    assert found.warnings == ()
    assert found.names == ("skill 0.2", "skill 0.9")
    reward = row(found, "reward")
    assert reward.differences[0] is None
    assert reward.differences[1].low > 0
    assert reward.differences[1].mean == pytest.approx(
        reward.values[1].mean - reward.values[0].mean
    )
    # Every answer is as long as the other.
    assert row(found, "reward brief").differences[1].mean == 0
    assert set(found.splits) == {"test", "ood"}


def test_a_run_does_not_differ_from_itself() -> None:
    found = compare([small_evaluation(), small_evaluation()])
    assert found.names == ("skill 0.5", "skill 0.5 (2)")
    for metric in found.splits["test"]:
        assert metric.values[0] == metric.values[1]
        assert (metric.differences[1].mean, metric.differences[1].excludes_zero) == (0, False)


def place(*, completions, **columns):
    return [float(i) for i in columns["id"]]


def test_prompts_are_paired_by_content_not_by_place() -> None:
    def run(order):
        return evaluate(
            WordAnswerer(skill=1.0),
            {"test": [rows(9)[i] for i in order]},
            [place],
            settings=EvaluationSettings(samples=2),
        )

    found = compare([run(range(9)), run([*range(8, 2, -1)])])
    assert row(found, "reward").differences[1].mean == 0
    assert row(found, "reward").values[1].mean == 5.5
    assert "6 of 6 prompts are among the 9" in found.warnings[0]
    assert "over these alone" in found.warnings[0]


def test_repeated_prompts_are_paired_one_to_one() -> None:
    def run(count):
        return evaluate(
            WordAnswerer(),
            {"test": [rows(1)[0]] * count},
            [names_colour],
            settings=EvaluationSettings(samples=2),
        )

    assert "2 of 3 prompts are among the 2" in compare([run(2), run(3)]).warnings[0]


def test_other_prompts_have_no_differences() -> None:
    def run(colours):
        return evaluate(
            WordAnswerer(),
            {"test": rows(4, colours)},
            [names_colour],
            settings=EvaluationSettings(samples=2),
        )

    found = compare([run(("red",)), run(("blue",))])
    assert "0 of 4 prompts" in found.warnings[0]
    assert all(metric.differences == (None, None) for metric in found.splits["test"])


def stricter(*, completions, **columns):
    return [0.0 for _ in completions]


stricter.__name__ = "brief"


@pytest.mark.parametrize(
    ("other", "warning", "incomparable", "comparable"),
    [
        ({"seed": 1}, "seed is 1, skill 0.5 has 0: part of every", (), ("reward",)),
        ({"temperature": 0.5}, "temperature is 0.5, skill 0.5 has 1.0", (), ("reward",)),
        ({"max_new_tokens": 2}, "max_new_tokens is 2", (), ("reward", "tokens")),
        ({"samples": 3}, "samples is 3", ("distinct-1", "self-BLEU"), ("reward", "tokens")),
        ({"greedy": False}, "only one of the two", ("reward, T=0",), ("reward",)),
        (
            {"rewards": (names_colour, stricter)},
            "reward brief has other code",
            ("reward", "reward, T=0", "reward brief"),
            ("reward names_colour", "tokens"),
        ),
        (
            {"rewards": (names_colour,)},
            "reward brief is not among the rewards of other",
            ("reward", "reward brief"),
            ("tokens",),
        ),
    ],
)  # fmt: skip
def test_what_differs_is_said_and_not_compared(other, warning, incomparable, comparable) -> None:
    found = compare([small_evaluation(), small_evaluation(name="other", **other)])
    assert len(found.warnings) == 1
    assert warning in found.warnings[0]
    assert found.warnings[0].startswith("other: ")
    for metric in incomparable:
        assert row(found, metric).differences[1] is None, metric
    for metric in comparable:
        assert row(found, metric).differences[1] is not None, metric


def test_other_weights_compare_the_parts_alone() -> None:
    first = small_evaluation()
    heavier = dataclasses.replace(first.rewards[1], weight=3.0)
    other = dataclasses.replace(first, rewards=(first.rewards[0], heavier))
    found = compare([first, other])
    assert "reward brief weighs 3, in skill 0.5 1; total rewards" in found.warnings[0]
    assert row(found, "reward").differences[1] is None
    assert row(found, "reward brief").differences[1] is not None


def test_other_encoders_do_not_compare_meaning() -> None:
    def run(encoder):
        return evaluate(
            WordAnswerer(),
            {"test": rows(3)},
            [names_colour],
            settings=EvaluationSettings(samples=2),
            encoder=encoder,
        )

    class Other(LengthEncoder):
        name = "other"

    found = compare([run(LengthEncoder()), run(Other())])
    assert "sentence encoder is other, words has lengths" in found.warnings[0]
    assert row(found, "semantic similarity").differences[1] is None
    assert row(compare([run(Other()), run(Other())]), "semantic similarity").differences[1]


def test_missing_splits_and_dropped_answers_are_said() -> None:
    def run(splits):
        return evaluate(
            WordAnswerer(),
            splits,
            [lambda *, completions, **columns: [float("nan"), *([1.0] * (len(completions) - 1))]],
            settings=EvaluationSettings(samples=2, greedy=False),
        )

    found = compare([run({"test": rows(2)}), run({"test": rows(2), "ood": rows(1)})])
    assert found.warnings == (
        "words: 1 of 4 answers have no reward and were dropped",
        "words (2): 2 of 6 answers have no reward and were dropped",
        "words (2): split ood is not in words",
    )
    assert row(found, "reward", "ood").values[0] is None
    assert row(found, "reward", "ood").differences == (None, None)


def test_three_runs_are_measured_against_the_first() -> None:
    found = compare([small_evaluation(s) for s in (0.5, 0.1, 1.0)])
    _, worse, better = row(found, "reward").differences
    assert worse.mean < 0 < better.mean


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare([small_evaluation()]), "at least two evaluations, got 1"),
        (
            lambda: compare([small_evaluation()] * 2, names=["a"]),
            r"one entry per evaluation \(2\), got 1",
        ),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
