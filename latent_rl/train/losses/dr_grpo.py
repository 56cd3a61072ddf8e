"""Dr. GRPO: GRPO without its two biases (arXiv 2503.20783)."""

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

__all__ = ["DrGRPO", "dr_grpo_loss"]

DEFAULTS = Defaults(scale_rewards="none")


def dr_grpo_loss(
    terms: PolicyTerms,
    *,
    max_completion_length: int,
    clip: ClipRange | None = None,
    beta: float = 0.0,
    ratio: RatioLevel | None = None,
) -> PolicyLoss:
    """Return sum_bt( loss_bt ) / (B * max_completion_length): a constant, so long wrong answers are
    not favoured. Its advantages are centred but not divided by the group's standard deviation."""
    token = surrogate(terms, clip=clip or ClipRange(), beta=beta, ratio=ratio)
    loss = token.per_token.sum() / (terms.logprobs.shape[0] * max_completion_length)
    return PolicyLoss(loss, token.low_clip, token.high_clip)


@dataclass(frozen=True)
class DrGRPO:
    """GRPO done right: no standard deviation, constant length normaliser."""

    name: str = "dr_grpo"
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
        """Return `dr_grpo_loss` with the normaliser's maximum length."""
        return dr_grpo_loss(
            terms,
            max_completion_length=normaliser.max_completion_length,
            clip=settings.clip,
            beta=settings.beta,
            ratio=settings.ratio,
        )
