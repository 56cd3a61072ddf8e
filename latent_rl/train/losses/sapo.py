"""SAPO: a smooth gate in the place of the clip (arXiv 2511.20347; TRL's `sapo`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from latent_rl.train.estimators import AdvantageEstimator, AdvantageSettings, GroupCentred
from latent_rl.train.losses.algorithm import GROUP_CHOICES, Defaults
from latent_rl.train.losses.objective import (
    LossSettings,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    SoftGate,
    bounded_exp,
    check_terms,
    kept_log_ratio,
    per_token_advantages,
    with_kl,
)
from latent_rl.train.losses.ratios import RatioLevel, TokenRatio

__all__ = ["SAPO", "sapo_loss"]

DEFAULTS = Defaults()


def sapo_loss(
    terms: PolicyTerms,
    *,
    gate: SoftGate | None = None,
    beta: float = 0.0,
    ratio: RatioLevel | None = None,
) -> PolicyLoss:
    """Return mean_b( mean_t( -(4 / tau) sigmoid(tau (ratio - 1)) A + beta * kl ) ), tau by the sign
    of the advantage: at ratio 1 the gradient is the policy gradient, and it fades on both sides.
    """
    check_terms(terms, beta)
    keep, advantages = terms.keep_mask, per_token_advantages(terms)
    gate = gate or SoftGate()
    weight = bounded_exp((ratio or TokenRatio())(kept_log_ratio(terms), keep))
    tau = torch.where(advantages > 0, gate.positive, gate.negative)
    per_token = -torch.sigmoid(tau * (weight - 1)) * 4 / tau * advantages
    lengths = keep.sum(-1).clamp(min=1)
    loss = (with_kl(per_token, terms, beta).sum(-1) / lengths).mean()
    none = torch.zeros_like(loss.detach())
    return PolicyLoss(loss, none, none)


@dataclass(frozen=True)
class SAPO:
    """Soft Adaptive Policy Optimization."""

    name: str = "sapo"
    defaults: Defaults = DEFAULTS
    choices: frozenset[str] = (GROUP_CHOICES - {"epsilon", "delta"}) | {
        "sapo_temperature_neg",
        "sapo_temperature_pos",
    }
    min_generations: int = 2
    uses_values: bool = False

    def estimator(self, settings: AdvantageSettings) -> AdvantageEstimator:
        """Return `GroupCentred`."""
        return GroupCentred(settings.scale, settings.normalize_advantages)

    def loss(
        self, terms: PolicyTerms, *, settings: LossSettings, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `sapo_loss`; needs no outside size."""
        return sapo_loss(terms, gate=settings.soft_gate, beta=settings.beta, ratio=settings.ratio)
