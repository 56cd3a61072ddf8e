"""REINFORCE++: clipped REINFORCE with globally whitened advantages (arXiv 2501.03262)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from latent_rl.train.estimators import AdvantageEstimator, AdvantageSettings, WhitenedReturns
from latent_rl.train.losses.algorithm import Defaults
from latent_rl.train.losses.objective import (
    ClipRange,
    LossSettings,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    surrogate,
)
from latent_rl.train.losses.ratios import RatioLevel

__all__ = ["BASELINE_DEFAULTS", "ReinforcePlusPlus", "reinforce_plus_plus_loss"]

DEFAULTS = Defaults(kl_in_reward=True)
BASELINE_DEFAULTS = Defaults()


def reinforce_plus_plus_loss(
    terms: PolicyTerms,
    *,
    num_tokens: Tensor,
    clip: ClipRange | None = None,
    beta: float = 0.0,
    ratio: RatioLevel | None = None,
) -> PolicyLoss:
    """Return sum_bt( -min(ratio A_bt, clip(ratio) A_bt) + beta * kl ) / num_tokens.

    num_tokens [] as for `dapo_loss`: advantages were whitened over those very tokens, so that with
    ratios of 1 the losses of a rollout sum to 0. By default the KL is part of the token rewards.
    """
    token = surrogate(terms, clip=clip or ClipRange(), beta=beta, ratio=ratio)
    loss = token.per_token.sum() / num_tokens.clamp(min=1)
    return PolicyLoss(loss, token.low_clip, token.high_clip)


@dataclass(frozen=True)
class ReinforcePlusPlus:
    """REINFORCE++, which needs no groups; with `group_baseline` its variant for several completions
    per prompt (REINFORCE++-baseline), which takes the group's mean reward off first and has the KL
    in the loss."""

    name: str = "reinforce_plus_plus"
    defaults: Defaults = DEFAULTS
    choices: frozenset[str] = frozenset({"epsilon", "delta", "importance_sampling_level", "gamma"})
    min_generations: int = 1
    uses_values: bool = False
    group_baseline: bool = False

    def estimator(self, settings: AdvantageSettings) -> AdvantageEstimator:
        """Return `WhitenedReturns`."""
        return WhitenedReturns(settings.gamma, self.group_baseline)

    def loss(
        self, terms: PolicyTerms, *, settings: LossSettings, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `reinforce_plus_plus_loss` with the normaliser's token count."""
        return reinforce_plus_plus_loss(
            terms,
            num_tokens=normaliser.num_tokens,
            clip=settings.clip,
            beta=settings.beta,
            ratio=settings.ratio,
        )
