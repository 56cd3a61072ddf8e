"""PPO: clipped policy and value losses over generalised advantages (arXiv 1707.06347)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latent_rl.train.estimators import AdvantageEstimator, AdvantageSettings, GeneralisedAdvantages
from latent_rl.train.losses.algorithm import Defaults
from latent_rl.train.losses.objective import (
    ClipRange,
    LossSettings,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    ValueTerms,
    surrogate,
)
from latent_rl.train.losses.ratios import RatioLevel

__all__ = ["PPO", "ppo_loss", "value_loss"]

DEFAULTS = Defaults(kl_in_reward=True)


def value_loss(
    value: ValueTerms, keep_mask: Tensor, *, num_tokens: Tensor, cliprange_value: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Return (loss [], share [] of kept tokens whose value was clipped).

    0.5 * sum_bt( max((V - R)^2, (clip(V) - R)^2) ) / num_tokens, clip(V) within cliprange_value of
    the value when the rollout was made.
    """
    zero = torch.zeros((), dtype=value.values.dtype, device=value.values.device)
    values, old, returns = (
        torch.where(keep_mask, given, zero)
        for given in (value.values, value.old_values, value.returns)
    )
    near = torch.minimum(torch.maximum(values, old - cliprange_value), old + cliprange_value)
    plain, clipped = (values - returns).square(), (near - returns).square()
    share = ((clipped > plain) & keep_mask).sum() / keep_mask.sum().clamp(min=1)
    loss = 0.5 * torch.maximum(plain, clipped).sum() / num_tokens.clamp(min=1)
    return loss, share


def ppo_loss(
    terms: PolicyTerms,
    *,
    num_tokens: Tensor,
    clip: ClipRange | None = None,
    beta: float = 0.0,
    ratio: RatioLevel | None = None,
    vf_coef: float = 0.1,
    cliprange_value: float = 0.2,
) -> PolicyLoss:
    """Return sum_bt( -min(ratio A_bt, clip(ratio) A_bt) + beta * kl ) / num_tokens plus vf_coef
    times `value_loss`.

    num_tokens [] as for `dapo_loss`. Metrics carry the names of TRL's PPOTrainer.

    Raises:
        ValueError: terms without a value side, or what `check_terms` refuses.
    """
    if terms.value is None:
        raise ValueError("ppo_loss: terms.value is needed, got None")
    token = surrogate(terms, clip=clip or ClipRange(), beta=beta, ratio=ratio)
    policy = token.per_token.sum() / num_tokens.clamp(min=1)
    value, share = value_loss(
        terms.value, terms.keep_mask, num_tokens=num_tokens, cliprange_value=cliprange_value
    )
    metrics = {
        "loss/policy_avg": policy.detach(),
        "loss/value_avg": value.detach(),
        "val/clipfrac_avg": share,
    }
    return PolicyLoss(policy + vf_coef * value, token.low_clip, token.high_clip, metrics)


@dataclass(frozen=True)
class PPO:
    """Proximal Policy Optimization with a value head beside the policy."""

    name: str = "ppo"
    defaults: Defaults = DEFAULTS
    choices: frozenset[str] = frozenset(
        {
            "epsilon",
            "delta",
            "importance_sampling_level",
            "gamma",
            "lam",
            "whiten_rewards",
            "vf_coef",
            "cliprange_value",
            "detach_value",
        }
    )
    min_generations: int = 1
    uses_values: bool = True

    def estimator(self, settings: AdvantageSettings) -> AdvantageEstimator:
        """Return `GeneralisedAdvantages`."""
        return GeneralisedAdvantages(settings.gamma, settings.lam, settings.whiten_rewards)

    def loss(
        self, terms: PolicyTerms, *, settings: LossSettings, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `ppo_loss` with the normaliser's token count."""
        return ppo_loss(
            terms,
            num_tokens=normaliser.num_tokens,
            clip=settings.clip,
            beta=settings.beta,
            ratio=settings.ratio,
            vf_coef=settings.vf_coef,
            cliprange_value=settings.cliprange_value,
        )
