"""DAPO: token-level mean, higher upper clip, dynamic sampling (arXiv 2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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

__all__ = ["DAPO", "dapo_loss"]

DEFAULTS = Defaults(epsilon_high=0.28, dynamic_sampling=True)


def dapo_loss(
    terms: PolicyTerms,
    *,
    num_tokens: Tensor,
    clip: ClipRange | None = None,
    beta: float = 0.0,
    ratio: RatioLevel | None = None,
) -> PolicyLoss:
    """Return sum_bt( loss_bt ) / num_tokens: every token of the generation batch weighs the same.

    num_tokens [] is the mean number of kept tokens per micro-batch over the generation batch, so
    that the average of the micro-batch losses is the token mean of the whole.
    """
    token = surrogate(terms, clip=clip or ClipRange(low=0.2, high=0.28), beta=beta, ratio=ratio)
    loss = token.per_token.sum() / num_tokens.clamp(min=1)
    return PolicyLoss(loss, token.low_clip, token.high_clip)


@dataclass(frozen=True)
class DAPO:
    """Decoupled clip and dynamic sampling policy optimisation."""

    name: str = "dapo"
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
        """Return `dapo_loss` with the normaliser's token count."""
        return dapo_loss(
            terms,
            num_tokens=normaliser.num_tokens,
            clip=settings.clip,
            beta=settings.beta,
            ratio=settings.ratio,
        )
