"""CISPO: the weight is clipped, no token loses its gradient (arXiv 2506.13585)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latent_rl.train.estimators import AdvantageEstimator, AdvantageSettings, GroupCentred
from latent_rl.train.losses.algorithm import GROUP_CHOICES, Defaults
from latent_rl.train.losses.objective import (
    LossSettings,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    bounded_exp,
    check_terms,
    kept_log_ratio,
    per_token_advantages,
    with_kl,
)
from latent_rl.train.losses.ratios import RatioLevel, TokenRatio

__all__ = ["CISPO", "cispo_loss"]

DEFAULTS = Defaults(epsilon_high=5.0)


def cispo_loss(
    terms: PolicyTerms,
    *,
    num_tokens: Tensor,
    max_weight: float = 5.0,
    beta: float = 0.0,
    ratio: RatioLevel | None = None,
) -> PolicyLoss:
    """Return sum_bt( -min(ratio, max_weight) * A * log pi + beta * kl ) / num_tokens, the weight
    without gradient.

    `epsilon_high` is max_weight itself, not an offset from 1, as in TRL and ScaleRL (arXiv
    2510.13786); there is no lower bound. num_tokens [] as for `dapo_loss`. high_clip is the share
    of kept tokens with positive advantage whose weight was cut.
    """
    check_terms(terms, beta)
    keep, advantages = terms.keep_mask, per_token_advantages(terms)
    weight = bounded_exp((ratio or TokenRatio())(kept_log_ratio(terms).detach(), keep))
    likelihood = torch.where(keep, terms.logprobs, 0.0)
    per_token = -weight.clamp(max=max_weight) * advantages * likelihood
    loss = with_kl(per_token, terms, beta).sum() / num_tokens.clamp(min=1)
    cut = ((weight > max_weight) & (advantages > 0) & keep).sum() / keep.sum().clamp(min=1)
    return PolicyLoss(loss, torch.zeros_like(cut), cut)


@dataclass(frozen=True)
class CISPO:
    """Clipped Importance-Sampling-weight Policy Optimization."""

    name: str = "cispo"
    defaults: Defaults = DEFAULTS
    choices: frozenset[str] = GROUP_CHOICES - {"epsilon", "delta"}
    min_generations: int = 2
    uses_values: bool = False

    def estimator(self, settings: AdvantageSettings) -> AdvantageEstimator:
        """Return `GroupCentred`."""
        return GroupCentred(settings.scale, settings.normalize_advantages)

    def loss(
        self, terms: PolicyTerms, *, settings: LossSettings, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `cispo_loss` with the normaliser's token count."""
        return cispo_loss(
            terms,
            num_tokens=normaliser.num_tokens,
            max_weight=settings.clip.high,
            beta=settings.beta,
            ratio=settings.ratio,
        )
