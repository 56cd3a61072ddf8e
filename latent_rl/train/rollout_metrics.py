"""Numbers that describe a rollout and an update, under TRL's names where it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from latent_rl.train.losses import PolicyLoss, PolicyTerms
    from latent_rl.train.rollout import Rollout

__all__ = ["rollout_metrics", "update_metrics"]


@torch.no_grad()
def rollout_metrics(
    rollout: Rollout, group_std: Tensor, num_codes: int, gather: Callable[[Tensor], Tensor]
) -> dict[str, Tensor | float]:
    """Return the metrics of a rollout over all ranks.

    gather: concatenates a tensor [n, ...] of every rank. Rewards are means over scored completions;
    `failed_rewards` counts the dropped ones, `rewards/<name>/failed` those a function failed on.
    Codes are counted where a completion has tokens.
    """
    rewards = gather(torch.where(rollout.keep_mask, rollout.rewards, torch.nan))
    per_function = gather(rollout.per_function)
    failed = gather(rollout.failed.sum(0)[None].float()).sum(0)
    lengths = gather(rollout.completion_mask.sum(1).float())
    ended = gather(rollout.terminated)
    dropped = gather((~rollout.keep_mask).sum().float())
    kept = rewards[~rewards.isnan()]
    codes = rollout.codes[rollout.codes >= 0]
    counts = gather(torch.bincount(codes, minlength=num_codes)[None].float()).sum(0)
    share = counts / counts.sum().clamp(min=1)
    metrics: dict[str, Tensor | float] = {
        "reward": kept.mean(),
        "reward_std": kept.std() if kept.numel() > 1 else kept.new_zeros(()),
        "frac_reward_zero_std": gather((group_std < 1e-8).float()).mean(),
        "failed_rewards": dropped.sum(),
        "completion_length": lengths.mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - ended.float().mean(),
        "codes_used": (counts > 0).sum().float(),
        "code_perplexity": torch.special.entr(share).sum().exp(),
    }
    if ended.any():
        metrics["completions/mean_terminated_length"] = lengths[ended].mean()
    for index, name in enumerate(rollout.names):
        values = per_function[:, index]
        values = values[~values.isnan()]
        metrics[f"rewards/{name}/mean"] = values.mean()
        metrics[f"rewards/{name}/std"] = (
            values.std() if values.numel() > 1 else values.new_zeros(())
        )
        metrics[f"rewards/{name}/failed"] = failed[index]
    return metrics


@torch.no_grad()
def update_metrics(
    terms: PolicyTerms, result: PolicyLoss, entropy: Tensor
) -> dict[str, Tensor | float]:
    """Return the metrics of a micro-batch: means over kept codes, and the loss's own.

    entropy: [B, T] of the distribution sampled from.
    """
    count = terms.keep_mask.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return torch.where(terms.keep_mask, values, 0.0).sum() / count

    metrics: dict[str, Tensor | float] = {
        "entropy": mean(entropy),
        "clip_ratio": result.low_clip + result.high_clip,
        "clip_ratio/low_mean": result.low_clip,
        "clip_ratio/high_mean": result.high_clip,
        "clip_ratio/region_mean": result.low_clip + result.high_clip,
        **result.metrics,
    }
    if terms.kl is not None:
        metrics["kl"] = mean(terms.kl)
    return metrics
