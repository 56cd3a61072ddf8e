"""Group-relative advantages with dropped samples."""

from __future__ import annotations

from collections.abc import Mapping
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
    "group_advantages",
    "reward_scale",
]

STD_EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""


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
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"group_advantages: rewards must be [B], B a multiple of group_size ({group_size}), "
            f"got {tuple(rewards.shape)}"
        )
    keep = torch.ones_like(rewards, dtype=torch.bool) if keep_mask is None else keep_mask
    grouped, kept = rewards.view(-1, group_size), keep.view(-1, group_size)
    values = grouped.masked_fill(~kept, 0.0)
    count = kept.sum(1)
    mean = values.sum(1) / count.clamp(min=1)
    centred = (values - mean[:, None]).masked_fill(~kept, 0.0)
    std = (centred.square().sum(1) / (count - 1).clamp(min=1)).sqrt()
    divisor = scale(grouped, kept, std)
    scaled = centred if divisor is None else centred / divisor
    return Advantages(scaled.reshape(-1), mean, std, count > 0)
