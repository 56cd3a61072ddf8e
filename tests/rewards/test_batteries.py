"""Programmatic rewards, by hand-made answers."""

from __future__ import annotations

from typing import Any

import pytest

from latent_rl.rewards import Gated, NamesTheFact, WellFormed, completion_text, score_all

DIGITS = ("one", "two", "three")


def scores(function: Any, answers: list[Any], **columns: Any) -> list[Any]:
    return list(
        function(
            prompts=[""] * len(answers),
            completions=answers,
            completion_ids=[[]] * len(answers),
            **columns,
        )
    )


def test_the_fact_alone_scores() -> None:
    reward = NamesTheFact(DIGITS, "digit")
    answers = ["It is two.", "TWO!", "It is one.", "One or two.", "Twofold.", ""]
    assert scores(reward, answers, digit=["two"] * 6) == [1, 1, 0, 0, 0, 0]


def test_naming_the_fact_twice_is_no_hedge() -> None:
    assert scores(NamesTheFact(DIGITS, "digit"), ["two, so add two"], digit=["two"]) == [1]


def test_no_fact_asked_is_not_applicable() -> None:
    assert scores(NamesTheFact(DIGITS, "digit"), ["It is two."], digit=[None]) == [None]


def test_chat_completions_are_read() -> None:
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "two."}]
    for content in ("It is two.", parts):
        answer = [{"role": "assistant", "content": content}]
        assert completion_text(answer) == "It is two."
        assert scores(NamesTheFact(DIGITS, "digit"), [answer], digit=["two"]) == [1]


def test_a_missing_column_and_an_unknown_fact_are_named() -> None:
    reward = NamesTheFact(DIGITS, "digit")
    with pytest.raises(ValueError, match=r"needs the dataset column 'digit', got \['label'\]"):
        scores(reward, ["two"], label=["two"])
    with pytest.raises(ValueError, match="must hold one of"):
        scores(reward, ["two"], digit=["four"])


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("It is two.", 1.0),
        ("it is two.", 0.75),
        ("It is two", 0.75),
        ("It is is two.", 0.75),
        ("It.", 0.75),
        ("two two", 0.0),
        ("", 0.0),
        ("...", 0.0),
    ],
)
def test_marks_of_form(text: str, share: float) -> None:
    assert WellFormed(min_words=3, max_words=4).score(text) == share


def test_form_refuses_a_long_answer() -> None:
    assert WellFormed(max_words=4).score("It is two, and that is that.") == 0.75


def test_gate_opens_on_one_alone() -> None:
    gate = NamesTheFact(DIGITS, "digit")
    gated = Gated(WellFormed(name="form"), gate)
    answers = ["It is two.", "It is one."]
    assert scores(gated, answers, digit=["two", "two"]) == [1.0, 0.0]
    assert scores(gated, answers, digit=[None, None]) == [1.0, 1.0]
    assert gated.__name__ == "form"


def test_every_gate_must_open() -> None:
    gated = Gated(
        WellFormed(), NamesTheFact(DIGITS, "digit"), NamesTheFact(("even", "odd"), "fact")
    )
    answers = ["It is two, even.", "It is two, odd.", "It is one, even."]
    assert scores(gated, answers, digit=["two"] * 3, fact=["even"] * 3) == [1.0, 0.0, 0.0]


def test_a_judge_may_be_gated_and_be_a_gate() -> None:
    async def judge(completions: Any, **columns: Any) -> list[Any]:
        return [0.7, 0.8, TimeoutError("late"), float("nan")][: len(completions)]

    gate = NamesTheFact(DIGITS, "digit")
    table = score_all(
        [Gated(judge, gate), Gated(gate, judge)],  # type: ignore[arg-type]
        prompts=[""] * 4,
        completions=["two", "one", "two", "two"],
        completion_ids=[[]] * 4,
        columns={"digit": ["two"] * 4},
    )
    assert table.names == ("judge", "names_the_fact")
    assert table.per_function[0][:2] == (0.7, 0.0)
    assert table.per_function[1][0] == 0.0  # 0.7 is no open gate
    assert table.failed_per_function == ((False, False, True, True),) * 2


def test_they_combine_under_weights_by_their_names() -> None:
    gate = NamesTheFact(DIGITS, "digit", "correct")
    table = score_all(
        [gate, Gated(WellFormed(min_words=3, name="form"), gate)],
        prompts=["", ""],
        completions=["it is two.", "It is one."],
        completion_ids=[[], []],
        columns={"digit": ["two", "two"]},
        weights=[0.6, 0.4],
    )
    assert table.names == ("correct", "form")
    assert table.rewards == pytest.approx((0.6 + 0.4 * 0.75, 0.0))


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="min_words <= max_words"):
        WellFormed(min_words=5, max_words=4)
    with pytest.raises(ValueError, match="at least one gate"):
        Gated(WellFormed())
