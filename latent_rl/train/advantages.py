"""Advantages with dropped samples: relative to a group, leave-one-out, generalised; whitening."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "REWARD_SCALES",
    "Advantages",
    "BatchScale",
    "GroupScale",
    "NoScale",
    "RewardScale",
    "gae",
    "group_advantages",
    "leave_one_out_advantages",
    "reward_scale",
    "terminal_rewards",
    "whiten",
]

STD_EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""

WHITEN_EPSILON = 1e-8
"""Added to a variance before its root is divided by, as in TRL's `masked_whiten`."""


class Advantages(NamedTuple):
    """advantages [B] (0 where dropped), group_mean [P], group_std [P] (unbiased; 0 for groups with
    fewer than two kept members), group_keep_mask [P] (True where a group has a kept member)."""

    advantages: Tensor
    group_mean: Tensor
    group_std: Tensor
    group_keep_mask: Tensor


class RewardScale(Protocol):
    """Divisor of the centred rewards."""

    def __call__(self, rewards: Tensor, keep_mask: Tensor, group_std: Tensor) -> Tensor | None:
        """rewards, keep_mask [P, G]; group_std [P] -> divisor broadcastable to [P, G], or None."""
        ...


class GroupScale:
    """Divide by the group's standard deviation (GRPO, arXiv 2402.03300)."""

    def __call__(self, rewards: Tensor, keep_mask: Tensor, group_std: Tensor) -> Tensor | None:
        return (group_std + STD_EPSILON)[:, None]


class BatchScale:
    """Divide by the standard deviation over the whole batch (arXiv 2508.08221)."""

    def __call__(self, rewards: Tensor, keep_mask: Tensor, group_std: Tensor) -> Tensor | None:
        kept = rewards[keep_mask]
        std = kept.std() if kept.numel() > 1 else kept.new_zeros(())
        return std + STD_EPSILON


class NoScale:
    """Only centre (Dr. GRPO, arXiv 2503.20783: dividing by the std favours too easy and too hard
    prompts)."""

    def __call__(self, rewards: Tensor, keep_mask: Tensor, group_std: Tensor) -> Tensor | None:
        return None


REWARD_SCALES: Mapping[str, RewardScale] = MappingProxyType(
    {"group": GroupScale(), "batch": BatchScale(), "none": NoScale()}
)


def reward_scale(name: str) -> RewardScale:
    """Return the scale of TRL's `scale_rewards` name. Raises ValueError for an unknown one."""
    if name not in REWARD_SCALES:
        raise ValueError(f"scale_rewards must be one of {sorted(REWARD_SCALES)}, got {name!r}")
    return REWARD_SCALES[name]


def group_advantages(
    rewards: Tensor, group_size: int, scale: RewardScale, keep_mask: Tensor | None = None
) -> Advantages:
    """Centre rewards on their group's mean and scale them: A = (r - mean_g) / scale.

    rewards [B] float, consecutive `group_size` rows are the completions of one prompt; keep_mask
    [B] bool, True where the row was scored. Dropped rows get advantage 0 and influence no mean and
    no standard deviation. Invariant to adding a constant to the rewards of a group.

    Raises:
        ValueError: B is not a multiple of group_size.
    """
    grouped, kept = _groups("group_advantages", rewards, group_size, keep_mask)
    values = grouped.masked_fill(~kept, 0.0)
    count = kept.sum(1)
    mean = values.sum(1) / count.clamp(min=1)
    centred = (values - mean[:, None]).masked_fill(~kept, 0.0)
    std = (centred.square().sum(1) / (count - 1).clamp(min=1)).sqrt()
    divisor = scale(grouped, kept, std)
    scaled = centred if divisor is None else centred / divisor
    return Advantages(scaled.reshape(-1), mean, std, count > 0)


def leave_one_out_advantages(
    rewards: Tensor, group_size: int, keep_mask: Tensor | None = None
) -> Tensor:
    """Return A = r_i - mean of the other kept rewards of the group [B] (RLOO, arXiv 2402.14740).

    rewards [B] float, consecutive `group_size` rows are the completions of one prompt; keep_mask
    [B] bool, True where the row was scored. Dropped rows get 0 and influence nothing; so does a
    single survivor, which has no baseline. Invariant to adding a constant to the rewards of a
    group.

    Raises:
        ValueError: B is not a multiple of group_size.
    """
    grouped, kept = _groups("leave_one_out_advantages", rewards, group_size, keep_mask)
    values = grouped.masked_fill(~kept, 0.0)
    others = kept.sum(1, keepdim=True) - 1
    baseline = (values.sum(1, keepdim=True) - values) / others.clamp(min=1)
    return (values - baseline).masked_fill(~kept | (others < 1), 0.0).reshape(-1)


def terminal_rewards(rewards: Tensor, token_mask: Tensor) -> Tensor:
    """Return [B, T] with each reward [B] on the last token of its row that token_mask [B, T] keeps,
    0 elsewhere; a row without a kept token gets none."""
    steps = torch.arange(token_mask.shape[1], device=token_mask.device)
    last = torch.where(token_mask, steps, -1).amax(1)
    return torch.where(steps == last[:, None], rewards[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, token_mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Return generalised advantages [B, T] (arXiv 1506.02438, eq. 16), 0 where not kept.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, t over the kept
    tokens of a row; beyond the last of them value and advantage are 0: a completion ends there,
    cut short or not. A gap in the mask is stepped over as if its tokens were not there.

    rewards, values [B, T] float; token_mask [B, T] bool. With lam = 1 and values 0 it is the
    discounted sum of the rewards to come.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        kept = token_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(kept, advantage, next_advantage)
        next_value = torch.where(kept, values[:, t], next_value)
        advantages[:, t] = torch.where(kept, advantage, 0.0)
    return advantages


def whiten(
    values: Tensor,
    mask: Tensor,
    *,
    gather: Callable[[Tensor], Tensor] = torch.Tensor.contiguous,
    shift_mean: bool = True,
) -> Tensor:
    """Return (values - mean) / std over the masked entries of all processes, 0 outside the mask.

    values float and mask bool, of one shape; std is unbiased with 1e-8 under its root, as in TRL.
    gather: concatenates a tensor [n, ...] of every process. shift_mean=False puts the mean back, so
    that rewards keep their sign. Moments are float64, so that the order of processes is no matter.
    """
    kept = values[mask].double()
    count, total = gather(torch.stack([mask.sum().double(), kept.sum()])[None]).sum(0)
    mean = total / count.clamp(min=1)
    square = gather((kept - mean).square().sum()[None]).sum()
    scale = (square / (count - 1).clamp(min=1) + WHITEN_EPSILON).rsqrt()
    centred = (values.double() - mean) * scale
    white = centred if shift_mean else centred + mean
    return torch.where(mask, white, 0.0).to(values.dtype)


def _groups(
    name: str, rewards: Tensor, group_size: int, keep_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """rewards and keep_mask [B] as [P, G]."""
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"{name}: rewards must be [B], B a multiple of group_size ({group_size}), "
            f"got {tuple(rewards.shape)}"
        )
    keep = torch.ones_like(rewards, dtype=torch.bool) if keep_mask is None else keep_mask
    return rewards.view(-1, group_size), keep.view(-1, group_size)
