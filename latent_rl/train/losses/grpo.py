"""GRPO: the mean over completions of each completion's mean (arXiv 2402.03300, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

from latent_rl.train.losses.objective import (
    ClipRange,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    surrogate,
)

__all__ = ["GRPO", "grpo_loss"]


def grpo_loss(
    terms: PolicyTerms, *, clip: ClipRange | None = None, beta: float = 0.0
) -> PolicyLoss:
    """Return mean_b( mean_t( loss_bt ) ), t over the kept tokens of completion b.

    Completions without a kept token (failed reward, truncated and masked) count as 0 in a
    denominator of B, as in TRL.
    """
    token = surrogate(terms, clip=clip or ClipRange(), beta=beta)
    lengths = terms.keep_mask.sum(-1).clamp(min=1)
    loss = (token.per_token.sum(-1) / lengths).mean()
    return PolicyLoss(loss, token.low_clip, token.high_clip)


@dataclass(frozen=True)
class GRPO:
    """Group Relative Policy Optimization."""

    name: str = "grpo"
    reward_scale: str = "group"
    epsilon_high: float | None = None
    dynamic_sampling: bool = False

    def loss(
        self, terms: PolicyTerms, *, clip: ClipRange, beta: float, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `grpo_loss`; needs no outside size."""
        return grpo_loss(terms, clip=clip, beta=beta)
