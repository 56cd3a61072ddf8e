"""Rewards for answers, facts, persona and form, by hand-made texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_rl.rewards import (
    ContainsAnswer,
    ExactAnswer,
    F1Answer,
    GroundedFacts,
    IsJson,
    LengthRange,
    MatchesAnswer,
    MatchesPattern,
    NumberAnswer,
    OverlongPenalty,
    PersonaMarkers,
    RepetitionPenalty,
    Tagged,
)
from latent_rl.rewards.matching import numbers_of, words_of
from latent_rl.rewards.persona import profile_markers, role_markers
from tests.rewards.test_batteries import scores

# Answers.


def test_words_are_compared_without_case_marks_and_articles() -> None:
    assert words_of("The Eiffel-Tower’s, a  ＬＩＧＨＴ!") == ["eiffel", "tower's", "light"]
    assert words_of("Étoile 评分 12") == ["étoile", "评分", "12"]


@pytest.mark.parametrize(
    ("comparison", "text", "answer", "value"),
    [
        (ExactAnswer(), "A red house.", "red house", 1.0),
        (ExactAnswer(), "red house, big", "red house", 0.0),
        (ContainsAnswer(), "I see the red house.", "Red house", 1.0),
        (ContainsAnswer(), "redder house", "red house", 0.0),
        (ContainsAnswer(), "house red", "red house", 0.0),
        (ContainsAnswer(max_words=3), "red house or a blue boat", "red house", 0.0),
        (ContainsAnswer(), "anything", "the", 0.0),
        # 2 of 3 said, 2 of 2 wanted: 2 * 2 / 5.
        (F1Answer(), "big red house", "red house", 0.8),
        # Said three times it is still one of three: 2 * 1 / 4.
        (F1Answer(), "red red red", "red", 0.5),
        (F1Answer(), "", "red", 0.0),
        (NumberAnswer(), "There are 3, no, 4 birds.", "4", 1.0),
        (NumberAnswer(), "There are 4, no, 3 birds.", "4", 0.0),
        (NumberAnswer(), "Four birds", "4.0", 1.0),
        (NumberAnswer(), "1,234.5 m", "1234.5", 1.0),
        (NumberAnswer(0.5), "about -2.4", "-2", 1.0),
        (NumberAnswer(), "many", "4", 0.0),
    ],
)
def test_comparisons(comparison: Any, text: str, answer: str, value: float) -> None:
    assert comparison.score(text, answer) == pytest.approx(value)


def test_numbers_in_words_and_signs() -> None:
    assert numbers_of("5-3 is two; v2.5, 10.5% of 1,000") == [5.0, 3.0, 2.0, 10.5, 1000.0]
    assert numbers_of("-3 and - 4") == [-3.0, 4.0]
    assert numbers_of("someone often alone") == []


def test_answers_with_aliases_marks_and_nothing_to_ask() -> None:
    reward = MatchesAnswer("answer", ExactAnswer())
    texts = ["NYC", "New York", "Boston", "?"]
    answers = [["New York", "NYC"], ["New York", "NYC"], ["New York", "NYC"], None]
    assert scores(reward, texts, answer=answers) == [1, 1, 0, None]
    assert scores(MatchesAnswer("n", NumberAnswer()), ["It is 7."], n=[7]) == [1]
    marked = MatchesAnswer(between=("<answer>", "</answer>"))
    texts = [
        "two? <answer>two</answer>",
        "<answer>one</answer> <answer>two</answer>",
        "two",
        "<answer>two",
    ]
    assert scores(marked, texts, answer=["two"] * 4) == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="holds an empty list"):
        scores(reward, ["x"], answer=[[]])
    with pytest.raises(ValueError, match="must hold one number"):
        scores(MatchesAnswer("n", NumberAnswer()), ["1"], n=["1 or 2"])


def test_facts_are_scored_by_f1_over_facts() -> None:
    facts = {"dog": ["puppy"], "cat": [], "red car": ["red automobile"]}
    reward = GroundedFacts(facts, "seen")
    texts = [
        "A dog and a red car.",
        "A puppy, a puppy, a red automobile!",
        "A dog.",
        "A dog, a cat, a red car.",
        "A red cat in a car.",
        "Nothing.",
    ]
    # Two true: all; all; 2*1/3; 2*2/5; 0 (cat alone); 0.
    expected = [1, 1, pytest.approx(2 / 3), pytest.approx(4 / 5), 0, 0]
    assert scores(reward, texts, seen=[["dog", "red car"]] * 6) == expected
    assert scores(reward, ["A dog.", "Hm.", "Hm."], seen=["dog", [], None]) == [1, 1, None]
    with pytest.raises(ValueError, match="holds 'horse', which is none of the facts"):
        scores(reward, ["x"], seen=[["horse"]])
    with pytest.raises(ValueError, match="at least one fact"):
        GroundedFacts([])


# Persona.

PROFILE = {
    "catchphrase": 'Elementary, my dear Watson. "The game is afoot!"',
    "relationship": "His friend is Dr. John Watson; he serves Queen Victoria.",
    "personality": "cold",
}


def test_markers_come_from_the_profile_and_the_role() -> None:
    assert profile_markers(PROFILE, "Sherlock Holmes") == [
        ["elementary", "my", "dear", "watson"],
        ["game", "is", "afoot"],
        ["john", "watson"],
        ["queen", "victoria"],
    ]
    assert profile_markers({"relationship": "Holmes met Holmes."}, "Sherlock Holmes") == []
    roles = {"Home": "Mother of the house", "Work": "Teacher"}
    assert role_markers(roles, "Home") == [["mother"], ["house"]]
    assert role_markers(roles) == [["mother"], ["house"], ["teacher"]]


def persona(*texts: str, **settings: Any) -> list[Any]:
    reward = PersonaMarkers(**settings)
    count = len(texts)
    columns = {"profile": [PROFILE] * count, "character": ["Sherlock Holmes"] * count}
    return scores(reward, list(texts), **columns)


def test_different_markers_count_and_repetition_does_not() -> None:
    plain = "I looked at the mud on his left boot and knew at once"
    one = f"{plain}: the game is afoot."
    # 3 of 14 words are a marker: one of the two that are enough.
    assert persona(plain, one) == [0, 0.5]
    assert persona(f"{one} John Watson agrees.") == [1.0]
    twice = f"{plain} {plain}: the game is afoot, the game is afoot."
    assert persona(twice) == [0.5]


def test_a_list_of_markers_earns_nothing() -> None:
    assert persona("The game is afoot! John Watson! Queen Victoria!") == [0.0]
    # 5 of 8 words: (1 - 5/8) / (1 - 1/2) of the full score.
    assert persona("The game is afoot, John Watson, so run now") == [pytest.approx(0.75)]


def test_rows_without_markers_are_not_applicable() -> None:
    reward = PersonaMarkers()
    assert scores(reward, ["x", "a mother knows"], role_set=[{}, {"Home": "mother"}]) == [None, 0.5]
    style = PersonaMarkers(style_words=["aye", "matey"], enough=1)
    assert scores(style, ["Aye, that is a fine ship"]) == [1.0]
    with pytest.raises(ValueError, match="needs a column profile, role_set or style_words"):
        scores(reward, ["x"], answer=["y"])
    with pytest.raises(ValueError, match=r"max_share must be in \(0, 1\)"):
        PersonaMarkers(max_share=1.0)


@given(st.text(max_size=80))
def test_persona_scores_stay_in_their_range(text: str) -> None:
    assert 0 <= persona(text)[0] <= 1


# Form.


def test_length_falls_in_a_line_outside_the_range() -> None:
    reward = LengthRange(2, 4, margin=3)
    assert [reward.score(n) for n in range(9)] == [0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [LengthRange(2, 4).score(n) for n in (1, 2, 4, 5)] == [0, 1, 1, 0]
    assert scores(LengthRange(2, 2), ["one two", "onetwo"]) == [1, 0]
    by_tokens = LengthRange(2, 2, tokens=True)
    given = {"prompts": [""] * 2, "completions": ["a", "a"], "completion_ids": [[1, 2], [1]]}
    assert by_tokens(**given) == [1, 0]
    with pytest.raises(ValueError, match="minimum <= maximum"):
        LengthRange(3, 2)


def test_penalties_are_trl_s() -> None:
    theirs = pytest.importorskip("trl.rewards", reason="TRL's rewards are the oracle of this test")
    ids = [[1] * n for n in (0, 79, 80, 81, 90, 100, 101)]
    overlong = theirs.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    given = {"prompts": [""] * 7, "completions": [""] * 7, "completion_ids": ids}
    assert OverlongPenalty(100, 20)(**given) == overlong(completion_ids=ids)
    assert OverlongPenalty(100, 20).score(90) == -0.5
    assert OverlongPenalty(100, 0).score(100) == 0
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 1], [1], []]
    given = {"prompts": [""] * 5, "completions": [""] * 5, "completion_ids": ids}
    penalty = theirs.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    assert RepetitionPenalty(2)(**given) == penalty(completion_ids=ids)
    assert RepetitionPenalty(2).score([5] * 5) == -0.75


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think>\n<answer>b</answer>", 1),
        (" <think>\na\n</think><answer>b</answer>\n", 1),
        ("<think></think><answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a</think><answer>b</answer> and more", 0),
        ("Well, <think>a</think><answer>b</answer>", 0),
        ("<think>a<think>a</think><answer>b</answer>", 0),
        ("<think>a<answer>b</think></answer>", 0),
        ("<think>a</think>", 0),
        ("", 0),
    ],
)
def test_tags_stand_once_in_order_and_filled(text: str, value: int) -> None:
    assert Tagged(("think", "answer")).score(text) == value


def test_patterns_match_the_whole_text() -> None:
    reward = MatchesPattern(r"Answer: \d+\..*")
    assert [reward.score(t) for t in ("Answer: 3.\nYes", " Answer: 3. ", "So Answer: 3.", "")] == [
        1,
        1,
        0,
        0,
    ]
    assert MatchesPattern("a*", max_chars=5).score("aaaaaa") == 0
    with pytest.raises(ValueError, match="cannot be compiled"):
        MatchesPattern("(")


def test_json_has_the_keys_and_types_asked() -> None:
    reward = IsJson({"answer": "string", "score": "number"})
    good = json.dumps({"answer": "x", "score": 2})
    assert reward.score(good) == 1
    assert reward.score(f"```json\n{good}\n```") == 1
    for bad in (
        f"{good} and more",
        json.dumps({"answer": "x"}),
        json.dumps({"answer": 1, "score": 2}),
        json.dumps({"answer": "x", "score": True}),
        json.dumps([1]),
        "[" * 100_000,
        "",
    ):
        assert reward.score(bad) == 0
    more = json.dumps({"answer": "x", "score": 2, "note": None})
    assert reward.score(more) == 1
    assert IsJson({"answer": "string", "score": "number"}, closed=True).score(more) == 0
    with pytest.raises(ValueError, match="answer must be one of string, number"):
        IsJson({"answer": "text"})


def test_a_wrong_setting_of_each_is_named() -> None:
    for make in (
        lambda: OverlongPenalty(10, 20),
        lambda: RepetitionPenalty(0),
        lambda: RepetitionPenalty(2, 1.0),
        lambda: Tagged(()),
        lambda: Tagged(("a b",)),
        lambda: NumberAnswer(-1),
    ):
        with pytest.raises(ValueError):
            make()
