"""Lift of tokens under codes, by hand."""

import pytest

from latent_rl.eval import Answer
from latent_rl.eval.code_tokens import code_uses


def decode(ids) -> str:
    return " ".join("abcdefgh"[i] for i in ids)


def test_lift_over_the_marginal_by_hand() -> None:
    # Code 0: a a b; code 1: b b b c. Marginal of 7 tokens: a 2/7, b 4/7, c 1/7.
    answers = [
        Answer("", tokens=(0, 0, 1, 1), codes=(0, 0, 0, 1)),
        Answer("", tokens=(1, 1, 2), codes=(1, 1, 1)),
    ]
    first, second = code_uses(answers, decode)
    assert (first.code, first.count, second.code, second.count) == (1, 4, 0, 3)
    # Contributions: b 3/4 log(21/16) = 0.204, c 1/4 log(7/4) = 0.140.
    assert [(t.token, t.count) for t in first.tokens] == [("b", 3), ("c", 1)]
    lifts = {t.token: t.lift for t in first.tokens}
    assert lifts == pytest.approx({"b": (3 / 4) / (4 / 7), "c": (1 / 4) / (1 / 7)})
    assert {t.token: t.lift for t in second.tokens} == pytest.approx({"a": (2 / 3) / (2 / 7)})


def test_a_token_seen_once_does_not_outrank_a_frequent_one() -> None:
    tokens = (0,) * 8 + (1,) + (0,) * 2 + (2,) * 10
    codes = (0,) * 9 + (1,) * 12
    (use,) = [u for u in code_uses([Answer("", tokens, codes)], decode) if u.code == 0]
    assert [t.token for t in use.tokens] == ["a", "b"]
    assert use.tokens[1].lift > use.tokens[0].lift


def test_examples_show_where_a_code_acted() -> None:
    answers = [
        Answer("", tokens=(0, 1, 2, 3, 4), codes=(9, 9, 5, 9, 9)),
        Answer("", tokens=(5, 6), codes=(5, 5)),
        Answer("no codes", tokens=(1,)),
    ]
    (use,) = [u for u in code_uses(answers, decode, context=1) if u.code == 5]
    assert [(e.before, e.token, e.after) for e in use.examples] == [("b", "c", "d"), ("", "f", "g")]


def test_codes_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one code per token \(2\), got 1"):
        code_uses([Answer("", (0, 1), (3,))], decode)
