"""The failure watch: what it counts, when it stops a run, and that it resumes where it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from latent_rl.rewards.failures import RewardFailure, failure_kind
from latent_rl.train.failure_watch import FailureWatch
from tests.train.test_rl_trainer import even_tokens, logged, make
from tests.train.test_stage_trainer import StopAt
from tests.train.tiny_world import moved, snapshot


class LimitedError(Exception):
    kind = "rate_limited"


class Part:
    """As much of a rollout as the watch reads."""

    def __init__(self, failed: list[bool], kind: str = "timeout", *, applies: bool = True) -> None:
        self.failed = torch.tensor(failed)[:, None]
        self.keep_mask = ~self.failed[:, 0] & torch.tensor(applies)
        self.failures = tuple(RewardFailure("judge", kind, f"judge: {kind}") for x in failed if x)

    def __len__(self) -> int:
        return len(self.failed)


def close(watch: FailureWatch, ranks: int = 1) -> None:
    """`check` with as many processes that saw the same."""
    watch.check(
        lambda tensor: tensor.repeat(ranks, 1), lambda objects: objects * ranks, torch.device("cpu")
    )


def roll(watch: FailureWatch, *failed: bool, kind: str = "timeout") -> None:
    watch.add(Part(list(failed), kind))
    close(watch)


def test_the_run_stops_above_the_rate_and_not_at_it() -> None:
    at = FailureWatch(0.5, 2)
    roll(at, True, False)
    roll(at, True, False)
    above = FailureWatch(0.5, 2)
    roll(above, True, False, kind="rate_limited")
    with pytest.raises(
        RuntimeError,
        match=r"failed on 3 of 4 completions \(75 %\) of the last 2 rollouts, above "
        r"max_reward_failure_rate=0\.5: timeout 2, rate_limited 1; for example: "
        r"judge: rate_limited; judge: timeout",
    ):
        roll(above, True, True)


def test_the_window_must_be_full_and_moves() -> None:
    watch = FailureWatch(0.4, 3)
    roll(watch, True, False)
    roll(watch, True, True)  # 3 of 4, but two rollouts only
    with pytest.raises(RuntimeError, match="3 of 6"):
        roll(watch, False, False)
    roll(watch, False, False)  # the first one has left: 2 of 6


def test_a_rate_of_zero_and_no_rate() -> None:
    with pytest.raises(RuntimeError, match="1 of 8 completions"):
        roll(FailureWatch(0.0, 1), True, *[False] * 7)
    never = FailureWatch(None, 1)
    for _ in range(5):
        roll(never, True, True, False)


def test_three_rollouts_without_a_reward_stop_any_run() -> None:
    watch = FailureWatch(None, 8)
    roll(watch, True, True)
    roll(watch, True, True)
    roll(watch, True, False)  # one reward: the count starts over
    roll(watch, True, True)
    roll(watch, True, True)
    with pytest.raises(RuntimeError, match=r"every reward of 3 rollouts in a row failed: timeout"):
        roll(watch, True, True)


def test_rewards_that_never_apply_stop_it_too_and_are_no_failures() -> None:
    watch = FailureWatch(0.0, 1)
    for _ in range(2):
        watch.add(Part([False, False], applies=False))
        close(watch)
    watch.add(Part([False, False], applies=False))
    with pytest.raises(RuntimeError, match="no reward function applied"):
        close(watch)


def test_parts_of_a_rollout_and_processes_add_up() -> None:
    watch = FailureWatch(0.5, 1)
    watch.add(Part([True, True]))
    watch.add(Part([False, True]))
    with pytest.raises(RuntimeError, match=r"6 of 8 completions.*timeout 6; for example: judge: t"):
        close(watch, ranks=2)


def test_a_resumed_watch_stops_where_the_other_does() -> None:
    watch = FailureWatch(0.5, 3)
    roll(watch, True, True)
    roll(watch, True, True, kind="rate_limited")
    resumed = FailureWatch(0.5, 3)
    resumed.load_state_dict(watch.state_dict())
    messages = []
    for each in (watch, resumed):
        with pytest.raises(RuntimeError) as caught:
            roll(each, True, True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_kinds_of_failures() -> None:
    assert failure_kind(LimitedError()) == "rate_limited"
    assert failure_kind(TimeoutError()) == "timeout"
    assert failure_kind(KeyError("x")) == "KeyError"


# In the trainer.


def failing(share: int):
    """A reward that fails on every `share`-th completion."""

    def judge(completion_ids, **columns):
        scores: list[Any] = even_tokens(completion_ids)
        scores[::share] = [LimitedError("slow down")] * len(scores[::share])
        return scores

    return judge


def test_a_run_stops_past_the_rate_with_reasons(tmp_path) -> None:
    settings = {"max_reward_failure_rate": 0.3, "reward_failure_window": 2, "max_steps": 6}
    trainer, _ = make(tmp_path, failing(2), **settings)
    with pytest.raises(
        RuntimeError,
        match=r"16 of 32 completions \(50 %\) of the last 2 rollouts.*rate_limited 16; for "
        r"example: reward judge failed: LimitedError: slow down",
    ):
        trainer.train()
    assert trainer.state.global_step == 1
    assert logged(trainer, "rewards/judge/failed") == [8]
    fewer, _ = make(tmp_path / "fewer", failing(4), **settings)
    fewer.train()
    assert fewer.state.global_step == 6
    assert logged(fewer, "rewards/judge/failed") == [4] * 6
    assert logged(fewer, "failed_rewards") == [4] * 6


def test_a_group_without_a_member_is_skipped_and_the_others_train(tmp_path) -> None:
    """Training with a lost group moves the policy as training without that group would: its
    completions have no gradient, and no statistic of the others contains them."""

    def loses_first_prompts(completion_ids, answer, **columns):
        scores = even_tokens(completion_ids)
        return [math.nan if a < 2 else s for a, s in zip(answer, scores, strict=True)]

    settings = {"beta": 0.0, "shuffle_dataset": False, "max_steps": 1, "loss_type": "grpo"}
    trainer, model = make(tmp_path / "lost", loses_first_prompts, **settings)
    before = snapshot(model)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["failed_rewards"] == 8
    assert math.isfinite(entry["reward"])
    assert math.isfinite(entry["loss"])
    assert moved(before, model)

    nobody, untouched = make(
        tmp_path / "none", lambda completion_ids, **c: [math.nan] * len(completion_ids), **settings
    )
    before = snapshot(untouched)
    nobody.train()  # one rollout alone does not stop the run
    assert moved(before, untouched) == set()
    assert nobody.state.log_history[0]["failed_rewards"] == 16


def test_a_resumed_run_remembers_its_failures(tmp_path) -> None:
    def broken(completion_ids, **columns):
        return [RuntimeError("down")] * len(completion_ids)

    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    cut, _ = make(tmp_path, broken, callbacks=[StopAt(2)], **saving)
    cut.train()
    resumed, _ = make(tmp_path, broken, **saving)
    with pytest.raises(RuntimeError, match="every reward of 3 rollouts in a row failed"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def test_what_rewards_log_reaches_the_log(tmp_path) -> None:
    def judge(completion_ids, log_metric, log_extra, **columns):
        log_metric("judge/requests", float(len(completion_ids)))
        log_extra("tokens", [len(ids) for ids in completion_ids])
        return even_tokens(completion_ids)

    trainer, _ = make(tmp_path, judge, max_steps=2)
    trainer.train()
    assert logged(trainer, "judge/requests") == [16, 16]
    assert len(trainer.rewards.log.columns["tokens"]) == 16
    assert trainer.evaluate()["eval_judge/requests"] == 32
