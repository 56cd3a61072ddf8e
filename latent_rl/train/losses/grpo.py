"""GRPO: the mean over completions of each completion's mean (arXiv 2402.03300, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

from latent_rl.train.estimators import AdvantageEstimator, AdvantageSettings, GroupCentred
from latent_rl.train.losses.algorithm import GROUP_CHOICES, Defaults
from latent_rl.train.losses.objective import (
    ClipRange,
    LossSettings,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    surrogate,
)
from latent_rl.train.losses.ratios import RatioLevel

__all__ = ["GRPO", "grpo_loss"]

DEFAULTS = Defaults()


def grpo_loss(
    terms: PolicyTerms,
    *,
    clip: ClipRange | None = None,
    beta: float = 0.0,
    ratio: RatioLevel | None = None,
) -> PolicyLoss:
    """Return mean_b( mean_t( loss_bt ) ), t over the kept tokens of completion b.

    Completions without a kept token (failed reward, truncated and masked) count as 0 in a
    denominator of B, as in TRL.
    """
    token = surrogate(terms, clip=clip or ClipRange(), beta=beta, ratio=ratio)
    lengths = terms.keep_mask.sum(-1).clamp(min=1)
    loss = (token.per_token.sum(-1) / lengths).mean()
    return PolicyLoss(loss, token.low_clip, token.high_clip)


@dataclass(frozen=True)
class GRPO:
    """Group Relative Policy Optimization."""

    name: str = "grpo"
    defaults: Defaults = DEFAULTS
    choices: frozenset[str] = GROUP_CHOICES
    min_generations: int = 2
    uses_values: bool = False

    def estimator(self, settings: AdvantageSettings) -> AdvantageEstimator:
        """Return `GroupCentred`."""
        return GroupCentred(settings.scale, settings.normalize_advantages)

    def loss(
        self, terms: PolicyTerms, *, settings: LossSettings, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `grpo_loss`; needs no outside size."""
        return grpo_loss(terms, clip=settings.clip, beta=settings.beta, ratio=settings.ratio)
