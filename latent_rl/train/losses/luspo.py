"""LUSPO: GSPO without its length bias (arXiv 2602.05261; TRL's `luspo`)."""

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
from latent_rl.train.losses.ratios import RatioLevel, SequenceRatio

__all__ = ["LUSPO", "luspo_loss"]

DEFAULTS = Defaults(importance_sampling_level="sequence")


def luspo_loss(
    terms: PolicyTerms,
    *,
    clip: ClipRange | None = None,
    beta: float = 0.0,
    ratio: RatioLevel | None = None,
) -> PolicyLoss:
    """Return mean_b( sum_t( loss_bt ) ): each completion weighs by its number of kept tokens, with
    one ratio per completion."""
    token = surrogate(terms, clip=clip or ClipRange(), beta=beta, ratio=ratio or SequenceRatio())
    return PolicyLoss(token.per_token.sum(-1).mean(), token.low_clip, token.high_clip)


@dataclass(frozen=True)
class LUSPO:
    """Length-Unbiased Sequence Policy Optimization."""

    name: str = "luspo"
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
        """Return `luspo_loss`; needs no outside size."""
        return luspo_loss(terms, clip=settings.clip, beta=settings.beta, ratio=settings.ratio)
