"""What every policy-gradient loss here shares: its inputs, the clipped surrogate, masked sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Algorithm", "ClipRange", "Normaliser", "PolicyLoss", "PolicyTerms", "surrogate"]


@dataclass(frozen=True)
class ClipRange:
    """The importance ratio is clipped to [1 - low, 1 + high]."""

    low: float = 0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.low <= 1 and self.high >= 0):
            raise ValueError(
                f"ClipRange: need 0 <= low <= 1 and high >= 0, got low={self.low}, high={self.high}"
            )


@dataclass(frozen=True)
class PolicyTerms:
    """Per-token inputs of a policy loss over B completions of at most T tokens.

    logprobs      [B, T] log-probability of the taken codes under the current policy (with gradient)
    old_logprobs  [B, T] under the policy that sampled them (no gradient)
    advantages    [B] or [B, T]
    keep_mask     [B, T] bool, True where a token takes part
    kl            [B, T] divergence from the reference (with gradient), or None
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    keep_mask: Tensor
    kl: Tensor | None = None


@dataclass(frozen=True)
class Normaliser:
    """Sizes a loss may divide by that its own micro-batch does not show.

    max_completion_length  tokens; Dr. GRPO's constant
    num_tokens             [] kept tokens per micro-batch, averaged over the whole generation batch
                           and all ranks; DAPO's denominator
    """

    max_completion_length: int
    num_tokens: Tensor


class PolicyLoss(NamedTuple):
    """loss [] with gradient; low_clip, high_clip [] share of kept tokens whose gradient is clipped
    away below (negative advantage) and above (positive advantage)."""

    loss: Tensor
    low_clip: Tensor
    high_clip: Tensor


class Algorithm(Protocol):
    """A named member of the GRPO family: its loss and the settings its paper uses."""

    @property
    def name(self) -> str: ...

    @property
    def reward_scale(self) -> str:
        """Default of `scale_rewards`."""
        ...

    @property
    def epsilon_high(self) -> float | None:
        """Default upper clip; None means the same as the lower one."""
        ...

    @property
    def dynamic_sampling(self) -> bool:
        """Whether groups without a learning signal are replaced by default."""
        ...

    def loss(
        self, terms: PolicyTerms, *, clip: ClipRange, beta: float, normaliser: Normaliser
    ) -> PolicyLoss: ...


class Surrogate(NamedTuple):
    """per_token [B, T] = -min(ratio * A, clip(ratio) * A) + beta * kl, and the clip shares."""

    per_token: Tensor
    low_clip: Tensor
    high_clip: Tensor


def surrogate(terms: PolicyTerms, *, clip: ClipRange, beta: float) -> Surrogate:
    """Return the clipped objective per token (PPO, arXiv 1707.06347, eq. 7), plus beta * kl.

    Kept-out tokens hold 0, so that a NaN there (a code that was never taken) reaches neither the
    loss nor the gradient.

    Raises:
        ValueError: shapes that do not match, or beta without kl.
    """
    shape = terms.logprobs.shape
    for name in ("old_logprobs", "keep_mask"):
        other = getattr(terms, name).shape
        if other != shape:
            raise ValueError(
                f"policy loss: {name} must have the shape of logprobs {tuple(shape)}, "
                f"got {tuple(other)}"
            )
    if beta and terms.kl is None:
        raise ValueError(f"policy loss: beta={beta} needs kl, got None")
    keep = terms.keep_mask
    advantages = terms.advantages
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    log_ratio = torch.where(keep, terms.logprobs - terms.old_logprobs, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high)
    per_token = -torch.min(ratio * advantages, clipped * advantages)
    if beta and terms.kl is not None:
        per_token = per_token + beta * torch.where(keep, terms.kl, 0.0)
    count = keep.sum().clamp(min=1)
    with torch.no_grad():
        low = (ratio < 1 - clip.low) & (advantages < 0) & keep
        high = (ratio > 1 + clip.high) & (advantages > 0) & keep
    return Surrogate(torch.where(keep, per_token, 0.0), low.sum() / count, high.sum() / count)
