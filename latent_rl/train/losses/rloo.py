"""RLOO: REINFORCE over whole completions with a leave-one-out baseline (arXiv 2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from latent_rl.train.estimators import AdvantageEstimator, AdvantageSettings, LeaveOneOut
from latent_rl.train.losses.algorithm import Defaults
from latent_rl.train.losses.objective import (
    ClipRange,
    LossSettings,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    bounded_exp,
    check_terms,
    kept_log_ratio,
)

__all__ = ["RLOO", "rloo_loss"]

DEFAULTS = Defaults(kl_in_reward=True)


def rloo_loss(
    terms: PolicyTerms, *, clip: ClipRange | None = None, beta: float = 0.0
) -> PolicyLoss:
    """Return mean_b( -min(w_b A_b, clip(w_b) A_b) ), w_b the product of completion b's ratios: the
    whole completion is one action, as in TRL's RLOOTrainer.

    beta adds the sum of the exact KL over the completion; by default the penalty is part of the
    reward instead. Clip shares are of the completions with a kept token; one without counts as 0.

    Raises:
        ValueError: advantages by token, or what `check_terms` refuses.
    """
    check_terms(terms, beta)
    if terms.advantages.ndim != 1:
        raise ValueError(f"rloo_loss: advantages must be [B], got {tuple(terms.advantages.shape)}")
    clip, keep, advantages = clip or ClipRange(), terms.keep_mask, terms.advantages
    ratio = bounded_exp(kept_log_ratio(terms).sum(-1))
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high)
    real = keep.any(-1)
    per_row = torch.where(real, -torch.min(ratio * advantages, clipped * advantages), 0.0)
    if beta and terms.kl is not None:
        per_row = per_row + beta * torch.where(keep, terms.kl, 0.0).sum(-1)
    count = real.sum().clamp(min=1)
    with torch.no_grad():
        low = (ratio < 1 - clip.low) & (advantages < 0) & real
        high = (ratio > 1 + clip.high) & (advantages > 0) & real
    return PolicyLoss(per_row.mean(), low.sum() / count, high.sum() / count)


@dataclass(frozen=True)
class RLOO:
    """REINFORCE Leave-One-Out."""

    name: str = "rloo"
    defaults: Defaults = DEFAULTS
    choices: frozenset[str] = frozenset({"normalize_advantages", "epsilon"})
    min_generations: int = 2
    uses_values: bool = False

    def estimator(self, settings: AdvantageSettings) -> AdvantageEstimator:
        """Return `LeaveOneOut`."""
        return LeaveOneOut(settings.normalize_advantages)

    def loss(
        self, terms: PolicyTerms, *, settings: LossSettings, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `rloo_loss`; needs no outside size."""
        return rloo_loss(terms, clip=settings.clip, beta=settings.beta)
