"""LatentGRPOConfig: TRL's names, algorithm defaults, early errors."""

from __future__ import annotations

import dataclasses

import pytest

from latent_rl.train import LatentGRPOConfig
from latent_rl.train.advantages import BatchScale, GroupScale, NoScale
from latent_rl.train.losses import SequenceRatio, TokenRatio


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
        ("gspo", 4e-4, GroupScale, 0),
        ("cispo", 5.0, GroupScale, 0),
        ("luspo", 0.2, GroupScale, 0),
        ("reinforce_plus_plus", 0.2, GroupScale, 0),
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
    assert made.rollout_size == 32
    assert made.micro_steps_per_rollout == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "ppo2"}, "loss_type must be one of .*'ppo'.*got 'ppo2'"),
        ({"scale_rewards": "prompt"}, "scale_rewards must be one of"),
        ({"num_generations": 1}, "num_generations must be >= 2"),
        ({"per_device_train_batch_size": 6}, "must be a multiple of num_generations"),
        ({"beta": -1.0}, "beta must be >= 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"num_iterations": 0}, "num_iterations must be >= 1"),
        ({"gamma": 0.9}, "gamma means nothing to loss_type 'grpo', got 0.9"),
        (
            {"loss_type": "rloo", "scale_rewards": "batch"},
            "scale_rewards means nothing to .*'rloo'",
        ),
        ({"loss_type": "rloo", "delta": 1.5}, "delta means nothing to loss_type 'rloo', got 1.5"),
        ({"loss_type": "cispo", "epsilon": 0.1}, "epsilon means nothing to loss_type 'cispo'"),
        ({"loss_type": "ppo", "gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"loss_type": "ppo", "cliprange_value": 0.0}, "cliprange_value must be > 0, got 0"),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.0}, "sapo_temperature_pos .* must be > 0"),
        ({"loss_type": "ppo", "num_generations": 1, "dynamic_sampling": True}, "must be >= 2"),
        ({"target_kl": -0.1}, "target_kl must be > 0 with a KL target, got -0.1"),
        ({"target_kl": 0.1, "beta": 0.0}, "beta must be > 0 with a KL target, got 0.0"),
        ({"entropy_schedule": "step"}, "entropy_schedule must be one of .*'cosine'.*got 'step'"),
        ({"sync_ref_model": True, "beta": 0.0}, "sync_ref_model needs beta > 0"),
        (
            {"sync_ref_model": True, "ref_model_mixup_alpha": 0.0},
            "ref_model_mixup_alpha must be in",
        ),
        ({"soft_punish_cache": 300}, r"soft_punish_cache must be in \[1, .*\(256\)\], got 300"),
        ({"reward_clip_range": [1.0, -1.0]}, "reward_clip_range must be"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must be >= 0"),
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
    theirs |= {field.name for field in dataclasses.fields(trl.RLOOConfig)}
    # PPOConfig, which TRL 1.x no longer ships.
    theirs |= {"gamma", "lam", "whiten_rewards", "vf_coef", "cliprange_value"}
    theirs |= {"missing_eos_penalty"}
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
        "log_completions_files",
        "stop_on_nan",
        "max_loss",
        "max_grad_norm_before_stop",
        "detach_value",
        "kl_in_reward",
        "target_kl",
        "kl_horizon",
        "entropy_schedule",
        "entropy_coef_end",
        "soft_punish_cache",
        "soft_punish_weight",
    }
    assert ours - theirs == extra


def test_what_the_decoder_cannot_take_is_refused_by_name(tmp_path) -> None:
    given = {"output_dir": str(tmp_path), "generation_kwargs": {"repetition_penalty": 1.1}}
    with pytest.raises(ValueError, match=r"got repetition_penalty; use_decoder=False"):
        LatentGRPOConfig(**given)
    assert LatentGRPOConfig(**given, use_decoder=False).generation_kwargs
    with pytest.raises(ValueError, match="decoder_slots must be >= 1 or None, got 0"):
        LatentGRPOConfig(output_dir=str(tmp_path), decoder_slots=0)


def test_gspo_and_luspo_have_ratios_of_completions():
    for name in ("gspo", "luspo"):
        assert config(loss_type=name).loss_settings(0.0).ratio == SequenceRatio()
    assert config(loss_type="grpo").loss_settings(0.0).ratio == TokenRatio()
    chosen = config(loss_type="grpo", importance_sampling_level="sequence")
    assert chosen.loss_settings(0.0).ratio == SequenceRatio()


def test_the_kl_stands_in_one_place():
    for name, inside in (("grpo", False), ("rloo", True), ("ppo", True)):
        made = config(loss_type=name, beta=0.3)
        assert made.puts_kl_in_reward() == inside
        assert made.loss_settings(0.3).beta == (0.0 if inside else 0.3)
    assert not config(loss_type="ppo", beta=0.0).puts_kl_in_reward()
    assert config(loss_type="ppo", kl_in_reward=False, beta=0.3).loss_settings(0.3).beta == 0.3


def test_a_command_line_parser_takes_the_settings():
    from transformers import HfArgumentParser

    line = "--output_dir unused --use_cpu --loss_type ppo --reward_clip_range -1 1 --target_kl 0.1"
    (made,) = HfArgumentParser(LatentGRPOConfig).parse_args_into_dataclasses(line.split())
    assert made.reward_clip_range == [-1.0, 1.0]
    assert made.kl_controller().target == 0.1
    assert made.algorithm().name == "ppo"
