"""GSPO: importance ratios and clipping by completion (arXiv 2507.18071)."""

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

__all__ = ["GSPO", "gspo_loss"]

DEFAULTS = Defaults(epsilon=3e-4, epsilon_high=4e-4, importance_sampling_level="sequence")


def gspo_loss(
    terms: PolicyTerms,
    *,
    clip: ClipRange | None = None,
    beta: float = 0.0,
    ratio: RatioLevel | None = None,
) -> PolicyLoss:
    """Return mean_b( -min(s_b A_b, clip(s_b) A_b) ) plus beta times the mean KL, with s_b the
    geometric mean of completion b's token ratios (eq. 5 and 7).

    Equal to GRPO with `importance_sampling_level="sequence"`; its ratios move by orders of
    magnitude less, hence the narrow default clip. Completions without a kept token count as 0.
    """
    ratio = ratio or SequenceRatio()
    token = surrogate(terms, clip=clip or ClipRange(3e-4, 4e-4), beta=beta, ratio=ratio)
    lengths = terms.keep_mask.sum(-1).clamp(min=1)
    loss = (token.per_token.sum(-1) / lengths).mean()
    return PolicyLoss(loss, token.low_clip, token.high_clip)


@dataclass(frozen=True)
class GSPO:
    """Group Sequence Policy Optimization."""

    name: str = "gspo"
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
        """Return `gspo_loss`; needs no outside size."""
        return gspo_loss(terms, clip=settings.clip, beta=settings.beta, ratio=settings.ratio)
