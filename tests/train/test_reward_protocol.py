"""The reward protocol: several functions, None, failures, async."""

from __future__ import annotations

import asyncio
import functools
import logging
import math

import pytest

from latent_rl.rewards.protocol import reward_name, score_all

BATCH = {
    "prompts": ["a", "b", "c"],
    "completions": ["x", "yy", "zzz"],
    "completion_ids": [[1], [1, 2], [1, 2, 3]],
    "columns": {"answer": ["x", "n", "zzz"]},
}


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def correct(completions, answer, **columns):
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def test_weighted_sum_with_columns():
    table = score_all([length, correct], **BATCH, weights=[0.5, 10.0])
    assert table.rewards == (0.5 + 10, 1.0, 1.5 + 10)
    assert table.names == ("length", "correct")
    assert table.per_function[1] == (1.0, 0.0, 1.0)
    assert table.num_dropped == 0


def test_none_means_not_applicable():
    def sometimes(**columns):
        return [None, 2.0, None]

    table = score_all([length, sometimes], **BATCH)
    assert table.rewards == (1.0, 4.0, 3.0)
    assert table.keep_mask == (True, True, True)
    alone = score_all([sometimes], **BATCH)
    assert alone.keep_mask == (False, True, False)
    assert not any(alone.failed)
    assert math.isnan(alone.rewards[0])


@pytest.mark.parametrize("broken", [math.nan, math.inf, RuntimeError("judge timed out")])
def test_a_failed_row_is_dropped_and_never_imputed(broken, caplog):
    def judge(**columns):
        return [1.0, broken, 3.0]

    with caplog.at_level(logging.WARNING):
        table = score_all([length, judge], **BATCH)
    assert table.keep_mask == (True, False, True)
    assert table.failed == (False, True, False)
    assert math.isnan(table.rewards[1])
    assert table.rewards[::2] == (2.0, 6.0)
    assert "judge failed" in caplog.text
    assert "1 of 3 samples dropped" in caplog.text


def test_a_raising_function_drops_its_batch_and_leaves_the_other_scores_visible(caplog):
    def raises(**columns):
        raise KeyError("answer")

    with caplog.at_level(logging.WARNING):
        table = score_all([length, raises], **BATCH)
    assert table.keep_mask == (False, False, False)
    assert table.per_function[0] == (1.0, 2.0, 3.0)
    assert "raises raised KeyError" in table.errors[0]
    assert "3 of 3" in caplog.text


def test_async_functions_run_together():
    started = []

    async def first(**columns):
        started.append("first")
        while len(started) < 2:  # returns only if the other one is started meanwhile
            await asyncio.sleep(0)
        return [1.0, 1.0, 1.0]

    async def second(**columns):
        started.append("second")
        return [2.0, 2.0, 2.0]

    table = score_all([first, second, length], **BATCH)
    assert table.rewards == (4.0, 5.0, 6.0)


def test_async_failure_is_a_failure():
    async def judge(**columns):
        raise TimeoutError("no answer")

    table = score_all([judge], **BATCH)
    assert table.keep_mask == (False, False, False)
    assert "TimeoutError" in table.errors[0]


def test_works_inside_a_running_loop():
    async def judge(**columns):
        await asyncio.sleep(0)
        return [1.0, 2.0, 3.0]

    async def notebook():
        return score_all([judge], **BATCH)

    assert asyncio.run(notebook()).rewards == (1.0, 2.0, 3.0)


def test_callable_objects_partials_and_repeated_names():
    class Judge:
        async def __call__(self, **columns):
            return [0.0, 0.0, 0.0]

    assert reward_name(Judge()) == "Judge"
    assert reward_name(functools.partial(length, answer=None)) == "length"
    assert score_all([Judge(), Judge()], **BATCH).names == ("Judge", "Judge_2")


def test_extra_arguments_are_passed_as_they_are():
    def wants_state(trainer_state, **columns):
        return [float(trainer_state)] * 3

    assert score_all([wants_state], **BATCH, extra={"trainer_state": 7}).rewards == (7.0,) * 3


def test_errors():
    with pytest.raises(ValueError, match=r"one value per completion \(3\), got 2"):
        score_all([lambda **columns: [1.0, 2.0]], **BATCH)
    with pytest.raises(ValueError, match="weights must have one entry"):
        score_all([length], **BATCH, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="answer must have one entry per prompt"):
        score_all([length], **{**BATCH, "columns": {"answer": ["x"]}})
    with pytest.raises(ValueError, match="at least one reward function"):
        score_all([], **BATCH)
