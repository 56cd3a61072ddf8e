"""KL targets, moving references, entropy schedules, reward shaping: by hand and in a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from latent_rl.train.coefficients import coefficient_schedule
from latent_rl.train.kl_control import AdaptiveKL, FixedKL, ReferenceSync
from latent_rl.train.reward_shaping import RewardShaping, soft_overlong_punishment
from latent_rl.train.values import ValueHead, explained_variance
from tests.train.test_rl_trainer import logged, make
from tests.train.test_stage_trainer import StopAt
from tests.train.tiny_world import moved, snapshot

ALL_AT_ONCE = {
    "loss_type": "ppo",
    "beta": 0.05,
    "target_kl": 1e-3,
    "kl_horizon": 64,
    "entropy_coef": 0.02,
    "entropy_schedule": "cosine",
    "sync_ref_model": True,
    "ref_model_sync_steps": 3,
    "num_iterations": 2,
    "cliprange_value": 0.1,
}


def test_adaptive_kl_worked_numbers():
    controller = AdaptiveKL(0.1, target=0.02, horizon=100)
    controller.update(0.022, 10)  # error .1
    assert controller.beta == pytest.approx(0.1 * 1.01)
    controller.update(1.0, 50)  # error cut to .2
    assert controller.beta == pytest.approx(0.101 * 1.1)
    controller.update(0.0, 100)  # and to -.2
    assert controller.beta == pytest.approx(0.1111 * 0.8)
    again = AdaptiveKL(0.1, target=0.02, horizon=100)
    again.load_state_dict(controller.state_dict())
    assert again.beta == controller.beta


def test_a_fixed_beta_stays():
    controller = FixedKL(0.1)
    controller.update(5.0, 100)
    assert controller.beta == 0.1
    assert controller.state_dict() == {}


def test_the_reference_moves_part_of_the_way_when_it_is_due():
    policy, reference = nn.Linear(2, 2), nn.Linear(2, 2)
    before = reference.weight.detach().clone()
    sync = ReferenceSync(alpha=0.25, steps=3)
    assert not sync(policy, reference, 2)
    assert torch.equal(reference.weight, before)
    assert sync(policy, reference, 3)
    torch.testing.assert_close(reference.weight, 0.25 * policy.weight + 0.75 * before)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", [0.4, 0.4, 0.4]),
        ("linear", [0.4, 0.25, 0.1]),
        ("cosine", [0.4, 0.25, 0.1]),
    ],
)
def test_schedules(name, values):
    schedule = coefficient_schedule(name, 0.4, 0.1)
    assert [schedule(p) for p in (0.0, 0.5, 1.0)] == pytest.approx(values)
    assert schedule(1.5) == pytest.approx(values[-1])
    if name == "cosine":
        assert schedule(0.25) == pytest.approx(0.1 + 0.3 * (1 + math.cos(math.pi / 4)) / 2)


def test_overlong_punishment_worked_numbers():
    lengths = torch.tensor([5, 8, 9, 10, 12, 13])
    made = soft_overlong_punishment(lengths, max_completion_length=12, cache=4)
    assert made.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    hard = soft_overlong_punishment(lengths, max_completion_length=12, cache=0)
    assert hard.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, -1.0]
    with pytest.raises(ValueError, match=r"cache must be in \[0, max_completion_length \(12\)\]"):
        soft_overlong_punishment(lengths, max_completion_length=12, cache=13)


def test_shaping_clips_then_punishes():
    shaping = RewardShaping(
        max_completion_length=10,
        clip=(-1.0, 1.0),
        soft_punish_cache=5,
        soft_punish_weight=2.0,
        missing_eos_penalty=0.5,
    )
    rewards = torch.tensor([3.0, 0.5, math.nan])
    out = shaping(rewards, torch.tensor([5, 10, 7]), torch.tensor([True, False, True]))
    assert out[:2].tolist() == [1.0, 0.5 - 2.0 - 0.5]
    assert out[2].isnan()
    plain = RewardShaping(max_completion_length=10)
    assert plain(rewards, torch.tensor([5, 10, 7]), torch.tensor([True, False, True])) is rewards


def test_a_value_head_begins_at_zero_and_may_stop_the_gradient():
    features = torch.randn(2, 3, 4, requires_grad=True)
    head = ValueHead(4)
    values = head(features)
    assert values.shape == (2, 3)
    assert values.eq(0).all()
    (values - 1).square().sum().backward()
    assert head.linear.weight.grad.abs().max() > 0
    assert features.grad is None
    through = ValueHead(4, detach=False)
    nn.init.ones_(through.linear.weight)
    through(features).sum().backward()
    assert features.grad.abs().max() > 0


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 9.0])
    mask = torch.tensor([True, True, True, False])
    assert explained_variance(returns + 5, returns, mask) == 1
    assert explained_variance(torch.zeros(4), returns, mask) == 0
    assert explained_variance(returns, torch.ones(4), mask).isnan()


def test_beta_is_steered_to_the_target(tmp_path):
    def flat(completions, **columns):
        return [0.0 for _ in completions]

    # Nothing to learn: the KL stays 0, below its target, and beta falls by .2 * 16 / 64 a step.
    idle, _ = make(tmp_path, flat, beta=0.1, target_kl=0.5, kl_horizon=64)
    idle.train()
    assert logged(idle, "beta") == pytest.approx([0.1 * 0.95**step for step in range(4)])
    # A policy that runs away from a narrow target meets a rising beta.
    runs, _ = make(tmp_path, beta=0.1, target_kl=1e-6, kl_horizon=64, num_iterations=2)
    runs.train()
    betas = logged(runs, "beta")
    assert betas[-1] > betas[1]
    fixed, _ = make(tmp_path, beta=0.1, num_iterations=2)
    fixed.train()
    assert logged(fixed, "beta") == [0.1] * 4


def test_the_kl_of_a_step_is_that_of_all_its_micro_batches(tmp_path):
    betas = []
    for size, accumulation in ((16, 1), (4, 4)):
        trainer, model = make(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            beta=0.1,
            target_kl=0.05,
            max_steps=1,
        )
        with torch.no_grad():
            model.latent.policy.head.weight.mul_(30)  # away from the reference
        trainer.train()
        betas.append(trainer.regularisation.beta)
    assert betas[0] != 0.1
    assert betas[0] == pytest.approx(betas[1], rel=1e-6)


def test_the_entropy_bonus_raises_entropy_and_fades(tmp_path):
    def flat(completions, **columns):
        return [0.0 for _ in completions]

    entropies = {}
    for coefficient in (0.0, 1.0):
        trainer, model = make(
            tmp_path,
            flat,
            beta=0.0,
            entropy_coef=coefficient,
            entropy_schedule="linear",
            learning_rate=2e-3,
        )
        with torch.no_grad():
            model.latent.policy.head.weight.mul_(10)
        trainer.train()
        entropies[coefficient] = logged(trainer, "entropy")
        expected = [1.0, 0.75, 0.5, 0.25] if coefficient else []
        assert logged(trainer, "entropy_coef") == pytest.approx(expected)
    assert entropies[0.0][-1] == pytest.approx(entropies[0.0][0], abs=0.1)
    assert entropies[1.0][-1] > entropies[0.0][-1] + 0.1


def test_the_bonus_is_the_mean_entropy_of_what_was_sampled(tmp_path):
    losses = []
    for coefficient in (0.0, 0.5):
        trainer, model = make(tmp_path, beta=0.0, entropy_coef=coefficient, top_k=3)
        replay = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        losses.append(trainer.compute_loss(model, replay).item())
        entropy = trainer.averages.flush()["entropy"]
    assert entropy <= math.log(3)
    assert losses[1] == pytest.approx(losses[0] - 0.5 * entropy, abs=1e-6)


def test_a_synchronised_reference_follows_the_policy(tmp_path):
    settings = {"max_steps": 3, "sync_ref_model": True, "ref_model_sync_steps": 2}
    trainer, model = make(tmp_path, **settings, ref_model_mixup_alpha=1.0)
    start = snapshot(model.latent.policy)
    seen = []
    original = trainer.training_step

    def watched(*args, **kwargs):
        seen.append(trainer.reference.head.weight.detach().clone())
        return original(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    assert torch.equal(seen[0], start["head.weight"])
    assert torch.equal(seen[1], start["head.weight"])
    assert not torch.equal(seen[2], start["head.weight"])
    kls = logged(trainer, "kl")
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[1] > 1e-6
    assert kls[2] == pytest.approx(0, abs=1e-6)  # the reference is the policy again


def test_shaped_rewards_make_the_advantages(tmp_path):
    settings = {"max_completion_length": 6, "scale_rewards": "none"}
    settings["generation_kwargs"] = {"eos_token_id": list(range(5, 60, 2))}  # of various lengths
    seen = {}
    for cache in (None, 6):
        trainer, _ = make(tmp_path, soft_punish_cache=cache, **settings)
        replay = trainer._new_replay(next(iter(trainer.get_train_dataloader())), 0)
        seen[cache] = replay.advantages.view(-1, 4), replay.keep_mask.sum(1).view(-1, 4)
    lengths = seen[None][1].float()
    assert (lengths != lengths[:, :1]).any()
    penalty = -lengths / 6
    expected = seen[None][0] + penalty - penalty.mean(1, keepdim=True)
    torch.testing.assert_close(seen[6][0], expected, rtol=0, atol=1e-6)


def test_everything_at_once_resumes_exactly(tmp_path):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, **ALL_AT_ONCE}
    whole, whole_model = make(tmp_path / "whole", **saving)
    whole.train()
    # Step 3 is in the middle of the second rollout and one at which the reference moves.
    cut, _ = make(tmp_path / "cut", callbacks=[StopAt(3)], **saving)
    cut.train()
    resumed, model = make(tmp_path / "cut", **saving)
    with torch.no_grad():
        resumed.value_head.linear.weight.add_(1.0)
        resumed.reference.head.weight.add_(1.0)
    resumed.train(resume_from_checkpoint=True)
    assert moved(snapshot(whole_model), model) == set()
    assert moved(snapshot(whole.reference), resumed.reference) == set()
    assert whole.regularisation.beta == resumed.regularisation.beta != 0.05
    names = ("beta", "entropy_coef", "kl", "loss/value_avg", "val/clipfrac_avg")
    for name in names:
        assert logged(whole, name) == logged(resumed, name)
