"""Group-relative advantages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_rl.train.advantages import STD_EPSILON, group_advantages, reward_scale

REWARDS = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])


def test_worked_numbers_per_scale():
    none = group_advantages(REWARDS, 3, reward_scale("none"))
    assert none.advantages.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert none.group_mean.tolist() == [2.0, 5.0]
    assert none.group_std.tolist() == [1.0, 0.0]
    group = group_advantages(REWARDS, 3, reward_scale("group")).advantages
    assert group[2].item() == pytest.approx(1 / (1 + STD_EPSILON))
    assert group[3:].tolist() == [0.0, 0.0, 0.0]
    batch = group_advantages(REWARDS, 3, reward_scale("batch")).advantages
    assert batch[2].item() == pytest.approx(1 / (REWARDS.std().item() + STD_EPSILON))


def test_dr_grpo_scale_keeps_the_spread_group_scale_removes_it():
    wide = torch.tensor([0.0, 10.0])
    narrow = torch.tensor([0.0, 0.1])
    none = reward_scale("none")
    ratio = (
        group_advantages(wide, 2, none).advantages / group_advantages(narrow, 2, none).advantages
    )
    torch.testing.assert_close(ratio, torch.full((2,), 100.0))
    group = reward_scale("group")
    a, b = (group_advantages(r, 2, group).advantages for r in (wide, narrow))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=0)


def test_dropped_rows_influence_nothing():
    rewards = torch.tensor([1.0, math.nan, 3.0, math.nan, math.nan, math.nan])
    keep = ~rewards.isnan()
    out = group_advantages(rewards, 3, reward_scale("none"), keep)
    assert out.advantages.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert out.group_keep_mask.tolist() == [True, False]
    assert out.group_std[0].item() == pytest.approx(math.sqrt(2))
    for name in ("group", "batch"):
        scaled = group_advantages(rewards, 3, reward_scale(name), keep).advantages
        assert scaled.isfinite().all()


def test_a_single_survivor_has_no_advantage():
    rewards = torch.tensor([math.nan, 4.0])
    out = group_advantages(rewards, 2, reward_scale("group"), ~rewards.isnan())
    assert out.advantages.tolist() == [0.0, 0.0]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(-50, 50), st.sampled_from(["group", "batch", "none"]))
def test_reward_shift_changes_nothing(seed, shift, name):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = reward_scale(name)
    a = group_advantages(rewards, 4, scale).advantages
    b = group_advantages(rewards + shift, 4, scale).advantages
    torch.testing.assert_close(a, b)


def test_errors():
    with pytest.raises(ValueError, match=r"multiple of group_size \(4\)"):
        group_advantages(REWARDS, 4, reward_scale("none"))
    with pytest.raises(ValueError, match="scale_rewards must be one of"):
        reward_scale("prompt")
