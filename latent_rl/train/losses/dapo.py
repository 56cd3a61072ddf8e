"""DAPO: token-level mean, higher upper clip, dynamic sampling (arXiv 2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from latent_rl.train.losses.objective import (
    ClipRange,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    surrogate,
)

__all__ = ["DAPO", "dapo_loss"]


def dapo_loss(
    terms: PolicyTerms,
    *,
    num_tokens: Tensor,
    clip: ClipRange | None = None,
    beta: float = 0.0,
) -> PolicyLoss:
    """Return sum_bt( loss_bt ) / num_tokens: every token of the generation batch weighs the same.

    num_tokens [] is the mean number of kept tokens per micro-batch over the generation batch, so
    that the average of the micro-batch losses is the token mean of the whole.
    """
    token = surrogate(terms, clip=clip or ClipRange(low=0.2, high=0.28), beta=beta)
    loss = token.per_token.sum() / num_tokens.clamp(min=1)
    return PolicyLoss(loss, token.low_clip, token.high_clip)


@dataclass(frozen=True)
class DAPO:
    """Decoupled clip and dynamic sampling policy optimisation."""

    name: str = "dapo"
    reward_scale: str = "group"
    epsilon_high: float | None = 0.28
    dynamic_sampling: bool = True

    def loss(
        self, terms: PolicyTerms, *, clip: ClipRange, beta: float, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `dapo_loss` with the normaliser's token count."""
        return dapo_loss(terms, num_tokens=normaliser.num_tokens, clip=clip, beta=beta)
