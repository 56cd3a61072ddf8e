"""BNPO: token mean within the micro-batch (arXiv 2506.02864; TRL's `bnpo`)."""

from __future__ import annotations

from dataclasses import dataclass

from latent_rl.train.losses.objective import (
    ClipRange,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    surrogate,
)

__all__ = ["BNPO", "bnpo_loss"]


def bnpo_loss(
    terms: PolicyTerms, *, clip: ClipRange | None = None, beta: float = 0.0
) -> PolicyLoss:
    """Return sum_bt( loss_bt ) / (kept tokens of this micro-batch). Equal to GRPO at batch size
    1."""
    token = surrogate(terms, clip=clip or ClipRange(), beta=beta)
    loss = token.per_token.sum() / terms.keep_mask.sum().clamp(min=1)
    return PolicyLoss(loss, token.low_clip, token.high_clip)


@dataclass(frozen=True)
class BNPO:
    """The GRPO objective averaged over the tokens of each micro-batch."""

    name: str = "bnpo"
    reward_scale: str = "group"
    epsilon_high: float | None = None
    dynamic_sampling: bool = False

    def loss(
        self, terms: PolicyTerms, *, clip: ClipRange, beta: float, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `bnpo_loss`; needs no outside size."""
        return bnpo_loss(terms, clip=clip, beta=beta)
