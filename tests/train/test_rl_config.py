"""LatentGRPOConfig: TRL's names, algorithm defaults, early errors."""

from __future__ import annotations

import dataclasses

import pytest

from latent_rl.train import LatentGRPOConfig
from latent_rl.train.advantages import BatchScale, GroupScale, NoScale


def config(**changes) -> LatentGRPOConfig:
    settings = {"output_dir": "unused", "use_cpu": True, "report_to": "none"}
    return LatentGRPOConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    ("loss_type", "high", "scale", "rounds"),
    [
        ("grpo", 0.2, GroupScale, 0),
        ("bnpo", 0.2, GroupScale, 0),
        ("dr_grpo", 0.2, NoScale, 0),
        ("dapo", 0.28, GroupScale, 3),
    ],
)
def test_defaults_follow_the_algorithm(loss_type, high, scale, rounds):
    made = config(loss_type=loss_type)
    assert made.clip_range().high == high
    assert isinstance(made.reward_scale(), scale)
    assert made.resample_rounds() == rounds


def test_given_values_win():
    made = config(loss_type="dapo", epsilon_high=0.5, scale_rewards="batch", dynamic_sampling=False)
    assert made.clip_range().high == 0.5
    assert isinstance(made.reward_scale(), BatchScale)
    assert made.resample_rounds() == 0
    assert isinstance(config(scale_rewards=False).reward_scale(), NoScale)
    assert isinstance(config(loss_type="dr_grpo", scale_rewards=True).reward_scale(), GroupScale)


def test_steps_per_generation_defaults_to_accumulation():
    made = config(gradient_accumulation_steps=4, num_iterations=2)
    assert made.steps_per_generation == 4
    assert made.generation_batch_size == 32
    assert made.micro_steps_per_rollout == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of"),
        ({"scale_rewards": "prompt"}, "scale_rewards must be one of"),
        ({"num_generations": 1}, "num_generations must be >= 2"),
        ({"per_device_train_batch_size": 6}, "must be a multiple of num_generations"),
        ({"beta": -1.0}, "beta must be >= 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"num_iterations": 0}, "num_iterations must be >= 1"),
        ({"epsilon": 2.0}, "low"),
        ({"max_reward_failure_rate": 1.5}, r"max_reward_failure_rate must be in \[0, 1\] or None"),
        ({"reward_failure_window": 0}, "reward_failure_window must be >= 1"),
        ({"delta": 1.1}, r"delta must be > 1 \+ epsilon_high \(1\.2\), got 1\.1"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of"),
    ],
)
def test_wrong_values_fail_before_any_rollout(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_names_are_trl_s():
    trl = pytest.importorskip("trl", reason="TRL's config is the oracle of this test")
    theirs = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    ours = {field.name for field in dataclasses.fields(LatentGRPOConfig)}
    extra = {
        "do_sample_tokens",
        "dynamic_sampling",
        "max_resample_rounds",
        "replay_dtype",
        "replay_layout",
        "replay_memory_gb",
        "replay_spill",
        "use_decoder",
        "decoder_slots",
        "decoder_compile",
        "max_reward_failure_rate",
        "reward_failure_window",
        "stop_on_nan",
        "max_loss",
        "max_grad_norm_before_stop",
    }
    assert ours - theirs == extra


def test_what_the_decoder_cannot_take_is_refused_by_name(tmp_path) -> None:
    given = {"output_dir": str(tmp_path), "generation_kwargs": {"repetition_penalty": 1.1}}
    with pytest.raises(ValueError, match=r"got repetition_penalty; use_decoder=False"):
        LatentGRPOConfig(**given)
    assert LatentGRPOConfig(**given, use_decoder=False).generation_kwargs
    with pytest.raises(ValueError, match="decoder_slots must be >= 1 or None, got 0"):
        LatentGRPOConfig(output_dir=str(tmp_path), decoder_slots=0)
