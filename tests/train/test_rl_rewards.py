"""LatentGRPOTrainer with a judge and with a reward model as its rewards."""

from __future__ import annotations

import math

import pytest

from latent_rl.rewards import RewardStop
from latent_rl.rewards.judge import Dimension, JudgeSettings, PairwiseJudge, Rubric
from latent_rl.train import LatentGRPOTrainer
from tests.rewards.fake_endpoint import KEY, Reply, endpoint, good
from tests.rewards.test_reward_model import classifier, tokenizer
from tests.train.test_rl_trainer import config, even_tokens, logged
from tests.train.test_stage_trainer import StopAt
from tests.train.tiny_world import moved, prompts, snapshot, tiny_model

WIT = Rubric("wit", "1", "The assistant is witty.", (Dimension("wit", "Is it witty?"),), 1, 10)


def trainer_of(path, reward, callbacks=None, **changes):
    model, processor = tiny_model(act=0.3)
    rows = [{**row, "reference": "two birds"} for row in prompts()]
    args = config(path, **{"max_steps": 2, "beta": 0.0, **changes})
    return LatentGRPOTrainer(model, reward, args, rows, None, processor, callbacks=callbacks), model


def judge(url, **changes):
    settings = {"timeout": 60.0, "max_retries": 0, **changes}
    return PairwiseJudge(JudgeSettings("judge-1", url, **settings), WIT)


def test_a_judge_trains_the_policy_and_its_failures_are_dropped(tmp_path):
    def behave(asked, number):
        return Reply("busy", 503) if number % 10 == 3 else good(asked, number)

    with endpoint(behave) as server:
        trainer, model = trainer_of(tmp_path, [judge(server.url), even_tokens])
        before = snapshot(model)
        trainer.train()
        assert moved(before, model)
        first = server.asked[0]
        assert len(first.images) <= 1
        assert "How many birds" in first.text("conversation")
        assert any(asked.images for asked in server.asked)
    failed = logged(trainer, "rewards/judge/failed")
    assert min(failed) > 0
    assert failed == logged(trainer, "failed_rewards")
    entry = trainer.state.log_history[0]
    assert entry["judge/requests"] > 0
    assert entry["judge/tokens"] > 0
    assert entry["judge/cache_hits"] == 0
    assert entry["judge/seconds"] > 0
    assert -1 <= entry["rewards/judge/mean"] <= 1
    assert math.isfinite(entry["loss"])


def test_a_judge_that_is_down_stops_the_run_with_the_reason(tmp_path):
    with endpoint(lambda asked, number: Reply("", 502)) as server:
        trainer, _ = trainer_of(tmp_path, judge(server.url), max_steps=9)
        with pytest.raises(
            RuntimeError, match=r"3 rollouts in a row failed: server_error \d+; for"
        ):
            trainer.train()


def test_a_spent_budget_ends_the_run_and_a_resumed_one_keeps_it_spent(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 9}
    with endpoint() as server:
        with_key = judge(server.url, api_key_env="JUDGE_KEY", cache_dir=tmp_path / "cache")
        first, _ = trainer_of(tmp_path, with_key, [StopAt(1)], **saving)
        first.train()
        used = len(server.asked)
        assert used > 2
        assert server.asked[0].authorization == f"Bearer {KEY}"
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert any(path.name.startswith("state-reward_0") for path in written)
        assert not any(KEY.encode() in path.read_bytes() for path in written)
        again = judge(server.url, max_requests=used)
        resumed, _ = trainer_of(tmp_path, again, **saving)
        with pytest.raises(RewardStop, match=f"{used} of max_requests={used} used"):
            resumed.train(resume_from_checkpoint=True)
        assert len(server.asked) == used


def test_a_reward_model_is_a_reward(tmp_path):
    model, processor = tiny_model(act=0.3)
    reward = classifier()
    kept = snapshot(reward)
    trainer = LatentGRPOTrainer(
        model,
        [reward, even_tokens],
        config(tmp_path, max_steps=1, beta=0.0),
        prompts(),
        processing_class=processor,
        reward_processing_classes=[tokenizer(), None],
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert math.isfinite(entry["rewards/Qwen2ForSequenceClassification/mean"])
    assert moved(kept, reward) == set()
