"""BNPO: token mean within the micro-batch (arXiv 2506.02864; TRL's `bnpo`)."""

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

__all__ = ["BNPO", "bnpo_loss"]

DEFAULTS = Defaults()


def bnpo_loss(
    terms: PolicyTerms,
    *,
    clip: ClipRange | None = None,
    beta: float = 0.0,
    ratio: RatioLevel | None = None,
) -> PolicyLoss:
    """Return sum_bt( loss_bt ) / (kept tokens of this micro-batch). Equal to GRPO at batch size
    1."""
    token = surrogate(terms, clip=clip or ClipRange(), beta=beta, ratio=ratio)
    loss = token.per_token.sum() / terms.keep_mask.sum().clamp(min=1)
    return PolicyLoss(loss, token.low_clip, token.high_clip)


@dataclass(frozen=True)
class BNPO:
    """The GRPO objective averaged over the tokens of each micro-batch."""

    name: str = "bnpo"
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
        """Return `bnpo_loss`; needs no outside size."""
        return bnpo_loss(terms, clip=settings.clip, beta=settings.beta, ratio=settings.ratio)
