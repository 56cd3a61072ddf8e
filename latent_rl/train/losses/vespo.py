"""VESPO: completions weighed by a Gamma function of their ratio (arXiv 2602.10693, as in TRL)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_rl.train.estimators import AdvantageEstimator, AdvantageSettings, GroupCentred
from latent_rl.train.losses.algorithm import Defaults
from latent_rl.train.losses.objective import (
    MAX_LOG_RATIO,
    GammaWeights,
    LossSettings,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    check_terms,
    kept_log_ratio,
    per_token_advantages,
    with_kl,
)

__all__ = ["VESPO", "vespo_loss"]

DEFAULTS = Defaults()
MIN_LOG_WEIGHT = math.log(1e-8)


def vespo_loss(
    terms: PolicyTerms,
    *,
    num_tokens: Tensor,
    weights: GammaWeights | None = None,
    beta: float = 0.0,
) -> PolicyLoss:
    """Return sum_bt( -phi(w_b) * A * log pi + beta * kl ) / num_tokens, phi without gradient.

    phi(w) = w^k exp(lambda (1 - w)) with w the product of a completion's ratios, phi(1) = 1; k and
    lambda by the sign of the advantage. Log ratios are cut to +-20 and log w to [log 1e-8, 20], as
    in TRL. num_tokens [] as for `dapo_loss`.
    """
    check_terms(terms, beta)
    weights = weights or GammaWeights()
    keep, advantages = terms.keep_mask, per_token_advantages(terms)
    ratios = kept_log_ratio(terms).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_weight = ratios.sum(-1, keepdim=True).clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    k = torch.where(advantages >= 0, weights.k_positive, weights.k_negative)
    rate = torch.where(advantages >= 0, weights.lambda_positive, weights.lambda_negative)
    rate = rate.clamp(min=1e-4)
    phi = (rate + k * log_weight - rate * log_weight.exp()).exp()
    likelihood = torch.where(keep, terms.logprobs, 0.0)
    loss = with_kl(-phi * advantages * likelihood, terms, beta).sum() / num_tokens.clamp(min=1)
    none = torch.zeros_like(loss.detach())
    return PolicyLoss(loss, none, none)


@dataclass(frozen=True)
class VESPO:
    """Variational Sequence-Level Soft Policy Optimization."""

    name: str = "vespo"
    defaults: Defaults = DEFAULTS
    choices: frozenset[str] = frozenset(
        {
            "scale_rewards",
            "normalize_advantages",
            "vespo_k_pos",
            "vespo_lambda_pos",
            "vespo_k_neg",
            "vespo_lambda_neg",
        }
    )
    min_generations: int = 2
    uses_values: bool = False

    def estimator(self, settings: AdvantageSettings) -> AdvantageEstimator:
        """Return `GroupCentred`."""
        return GroupCentred(settings.scale, settings.normalize_advantages)

    def loss(
        self, terms: PolicyTerms, *, settings: LossSettings, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `vespo_loss` with the normaliser's token count."""
        return vespo_loss(
            terms,
            num_tokens=normaliser.num_tokens,
            weights=settings.gamma_weights,
            beta=settings.beta,
        )
