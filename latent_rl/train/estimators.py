"""How a scored rollout becomes advantages: one object per way, chosen by the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from latent_rl.train.advantages import (
    STD_EPSILON,
    GroupScale,
    RewardScale,
    gae,
    group_advantages,
    leave_one_out_advantages,
    terminal_rewards,
    whiten,
)

__all__ = [
    "AdvantageEstimator",
    "AdvantageSettings",
    "Estimate",
    "GeneralisedAdvantages",
    "GroupCentred",
    "LeaveOneOut",
    "ScoredRollout",
    "WhitenedReturns",
]


@dataclass(frozen=True)
class ScoredRollout:
    """What advantages are made of.

    rewards     [B] float; anything where not kept
    keep_mask   [B] bool, True where a completion was scored
    token_mask  [B, T] bool, True where a token takes part in the loss
    group_size  G; consecutive G rows are the completions of one prompt
    penalty     [B, T] subtracted from the reward token by token (beta * log pi_old / pi_ref of the
                taken codes), or None
    values      [B, T] of the value head, V(e_1..e_t) before the code at t is taken, or None
    gather      concatenates a tensor [n, ...] of every process
    """

    rewards: Tensor
    keep_mask: Tensor
    token_mask: Tensor
    group_size: int
    penalty: Tensor | None = None
    values: Tensor | None = None
    gather: Callable[[Tensor], Tensor] = torch.Tensor.contiguous

    def sequence_rewards(self) -> Tensor:
        """Return the rewards less the whole penalty of their completion [B]."""
        if self.penalty is None:
            return self.rewards
        return self.rewards - torch.where(self.token_mask, self.penalty, 0.0).sum(1)

    def token_rewards(self) -> Tensor:
        """Return [B, T]: the reward on the last kept token, less the penalty on each; 0 for dropped
        completions."""
        kept = self.token_mask & self.keep_mask[:, None]
        rewards = terminal_rewards(self.rewards.masked_fill(~self.keep_mask, 0.0), kept)
        if self.penalty is None:
            return rewards
        return rewards - torch.where(kept, self.penalty, 0.0)


class Estimate(NamedTuple):
    """advantages [B] or [B, T], 0 where dropped; returns [B, T] for a value head to regress on, or
    None."""

    advantages: Tensor
    returns: Tensor | None = None


class AdvantageEstimator(Protocol):
    """Makes advantages of a scored rollout."""

    def __call__(self, rollout: ScoredRollout) -> Estimate: ...


@dataclass(frozen=True)
class AdvantageSettings:
    """What a run chose for its advantages.

    scale                 divisor of group-centred rewards
    normalize_advantages  of completions: to mean 0 and standard deviation 1 over the rollout
    gamma, lam            discount and lambda of generalised advantages
    whiten_rewards        divide token rewards by their standard deviation first
    """

    scale: RewardScale = field(default_factory=GroupScale)
    normalize_advantages: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class GroupCentred:
    """The reward less its group's mean, scaled (GRPO)."""

    scale: RewardScale
    normalize: bool = False

    def __call__(self, rollout: ScoredRollout) -> Estimate:
        rewards = rollout.sequence_rewards()
        made = group_advantages(rewards, rollout.group_size, self.scale, rollout.keep_mask)
        return Estimate(
            _normalised(made.advantages, rollout) if self.normalize else made.advantages
        )


@dataclass(frozen=True)
class LeaveOneOut:
    """The reward less the mean of its group's others (RLOO)."""

    normalize: bool = False

    def __call__(self, rollout: ScoredRollout) -> Estimate:
        made = leave_one_out_advantages(
            rollout.sequence_rewards(), rollout.group_size, rollout.keep_mask
        )
        return Estimate(_normalised(made, rollout) if self.normalize else made)


@dataclass(frozen=True)
class WhitenedReturns:
    """The rewards to come, whitened over all tokens of the rollout on all processes (REINFORCE++,
    arXiv 2501.03262).

    group_baseline: subtract the group's mean reward first (the paper's variant for several
    completions per prompt).
    """

    gamma: float = 1.0
    group_baseline: bool = False

    def __call__(self, rollout: ScoredRollout) -> Estimate:
        rewards = rollout.token_rewards()
        kept = rollout.token_mask & rollout.keep_mask[:, None]
        if self.group_baseline:
            mean = group_advantages(
                rollout.rewards, rollout.group_size, GroupScale(), rollout.keep_mask
            ).group_mean.repeat_interleave(rollout.group_size)
            rewards = rewards - terminal_rewards(mean, kept)
        returns = gae(rewards, torch.zeros_like(rewards), kept, gamma=self.gamma, lam=1.0)
        return Estimate(whiten(returns, kept, gather=rollout.gather))


@dataclass(frozen=True)
class GeneralisedAdvantages:
    """GAE over the codes against a value head, whitened; returns are advantages (before whitening)
    plus values (PPO)."""

    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False

    def __call__(self, rollout: ScoredRollout) -> Estimate:
        if rollout.values is None:
            raise ValueError("GeneralisedAdvantages: the rollout needs values, got None")
        kept = rollout.token_mask & rollout.keep_mask[:, None]
        rewards = rollout.token_rewards()
        if self.whiten_rewards:
            rewards = whiten(rewards, kept, gather=rollout.gather, shift_mean=False)
        advantages = gae(rewards, rollout.values, kept, gamma=self.gamma, lam=self.lam)
        returns = torch.where(kept, advantages + rollout.values, 0.0)
        return Estimate(whiten(advantages, kept, gather=rollout.gather), returns)


def _normalised(advantages: Tensor, rollout: ScoredRollout) -> Tensor:
    """Mean 0 and standard deviation 1 over the kept completions of all processes, as in TRL's RLOO
    (the 1e-4 stands outside the root)."""
    kept = advantages[rollout.keep_mask]
    count, total = rollout.gather(torch.stack([rollout.keep_mask.sum(), kept.sum()])[None]).sum(0)
    mean = total / count.clamp(min=1)
    square = rollout.gather((kept - mean).square().sum()[None]).sum()
    std = (square / (count - 1).clamp(min=1)).sqrt()
    return torch.where(rollout.keep_mask, (advantages - mean) / (std + STD_EPSILON), 0.0)
