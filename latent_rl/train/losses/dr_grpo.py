"""Dr. GRPO: GRPO without its two biases (arXiv 2503.20783)."""

from __future__ import annotations

from dataclasses import dataclass

from latent_rl.train.losses.objective import (
    ClipRange,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    surrogate,
)

__all__ = ["DrGRPO", "dr_grpo_loss"]


def dr_grpo_loss(
    terms: PolicyTerms,
    *,
    max_completion_length: int,
    clip: ClipRange | None = None,
    beta: float = 0.0,
) -> PolicyLoss:
    """Return sum_bt( loss_bt ) / (B * max_completion_length): a constant, so long wrong answers are
    not favoured. Its advantages are centred but not divided by the group's standard deviation."""
    token = surrogate(terms, clip=clip or ClipRange(), beta=beta)
    loss = token.per_token.sum() / (terms.logprobs.shape[0] * max_completion_length)
    return PolicyLoss(loss, token.low_clip, token.high_clip)


@dataclass(frozen=True)
class DrGRPO:
    """GRPO done right: no standard deviation, constant length normaliser."""

    name: str = "dr_grpo"
    reward_scale: str = "none"
    epsilon_high: float | None = None
    dynamic_sampling: bool = False

    def loss(
        self, terms: PolicyTerms, *, clip: ClipRange, beta: float, normaliser: Normaliser
    ) -> PolicyLoss:
        """Return `dr_grpo_loss` with the normaliser's maximum length."""
        return dr_grpo_loss(
            terms, max_completion_length=normaliser.max_completion_length, clip=clip, beta=beta
        )
