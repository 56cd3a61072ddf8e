"""What every policy-gradient loss here shares: its inputs, the clipped surrogate, masked sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from latent_rl.train.losses.ratios import RatioLevel, TokenRatio

__all__ = [
    "MAX_LOG_RATIO",
    "ClipRange",
    "GammaWeights",
    "LossSettings",
    "Normaliser",
    "PolicyLoss",
    "PolicyTerms",
    "SoftGate",
    "Surrogate",
    "ValueTerms",
    "bounded_exp",
    "check_terms",
    "kept_log_ratio",
    "per_token_advantages",
    "surrogate",
    "with_kl",
]


MAX_LOG_RATIO = 20.0
"""Log ratios are cut here, at a ratio of 5e8, before exp: an overflow would make the gradient of
clipped tokens 0 * inf. TRL's own losses overflow instead (but for VESPO's, which cuts here too)."""


@dataclass(frozen=True)
class ClipRange:
    """The importance ratio is clipped to [1 - low, 1 + high].

    delta bounds the ratio from above also where clipping leaves it alone (negative advantages), as
    in INTELLECT-2 (arXiv 2505.07291); it must exceed 1 + high to mean anything. None: no bound.
    """

    low: float = 0.2
    high: float = 0.2
    delta: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.low <= 1 and self.high >= 0):
            raise ValueError(
                f"ClipRange: need 0 <= low <= 1 and high >= 0, got low={self.low}, high={self.high}"
            )
        if self.delta is not None and self.delta <= 1 + self.high:
            raise ValueError(
                f"ClipRange: delta must be > 1 + epsilon_high ({1 + self.high}), got {self.delta}"
            )


@dataclass(frozen=True)
class SoftGate:
    """SAPO's temperatures for tokens of positive and of other advantages."""

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        if not (self.positive > 0 and self.negative > 0):
            raise ValueError(
                "sapo_temperature_pos and sapo_temperature_neg must be > 0, "
                f"got {self.positive} and {self.negative}"
            )


@dataclass(frozen=True)
class GammaWeights:
    """VESPO's k and lambda for completions of non-negative and of negative advantages."""

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0


@dataclass(frozen=True)
class LossSettings:
    """What a run chose for its loss.

    clip             the ratio's range
    beta             weight of the KL term in the loss; 0 where the penalty is part of the reward
    ratio            what an importance ratio belongs to
    vf_coef          weight of the value loss (PPO)
    cliprange_value  how far a value may move from the rollout's before its loss stops pulling it
                     further (PPO)
    soft_gate        SAPO's temperatures
    gamma_weights    VESPO's exponents
    """

    clip: ClipRange = field(default_factory=ClipRange)
    beta: float = 0.0
    ratio: RatioLevel = field(default_factory=TokenRatio)
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    soft_gate: SoftGate = field(default_factory=SoftGate)
    gamma_weights: GammaWeights = field(default_factory=GammaWeights)

    def __post_init__(self) -> None:
        for name in ("beta", "vf_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not self.cliprange_value > 0:
            raise ValueError(f"cliprange_value must be > 0, got {self.cliprange_value}")


@dataclass(frozen=True)
class ValueTerms:
    """Inputs of a value loss, each [B, T]: the value head's output (with gradient), its output when
    the rollout was made, and the returns to regress on."""

    values: Tensor
    old_values: Tensor
    returns: Tensor


@dataclass(frozen=True)
class PolicyTerms:
    """Per-token inputs of a policy loss over B completions of at most T tokens.

    logprobs      [B, T] log-probability of the taken codes under the current policy (with gradient)
    old_logprobs  [B, T] under the policy that sampled them (no gradient)
    advantages    [B] or [B, T]
    keep_mask     [B, T] bool, True where a token takes part
    kl            [B, T] divergence from the reference (with gradient), or None
    value         the value head's side, or None
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    keep_mask: Tensor
    kl: Tensor | None = None
    value: ValueTerms | None = None


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
    """loss [] with gradient; low_clip, high_clip [] share of kept tokens (of completions, where the
    ratio is theirs) whose gradient is clipped away below (negative advantage) and above (positive
    advantage); metrics [] each, to be logged beside."""

    loss: Tensor
    low_clip: Tensor
    high_clip: Tensor
    metrics: Mapping[str, Tensor] = MappingProxyType({})


class Surrogate(NamedTuple):
    """per_token [B, T] = -min(ratio * A, clip(ratio) * A) + beta * kl, and the clip shares."""

    per_token: Tensor
    low_clip: Tensor
    high_clip: Tensor


def check_terms(terms: PolicyTerms, beta: float) -> None:
    """Raise ValueError for shapes that do not match, or beta without kl."""
    shape = terms.logprobs.shape
    for name in ("old_logprobs", "keep_mask"):
        other = getattr(terms, name).shape
        if other != shape:
            raise ValueError(
                f"policy loss: {name} must have the shape of logprobs {tuple(shape)}, "
                f"got {tuple(other)}"
            )
    if terms.advantages.shape not in (shape, shape[:1]):
        raise ValueError(
            f"policy loss: advantages must be {tuple(shape[:1])} or {tuple(shape)}, "
            f"got {tuple(terms.advantages.shape)}"
        )
    if beta and terms.kl is None:
        raise ValueError(f"policy loss: beta={beta} needs kl, got None")


def kept_log_ratio(terms: PolicyTerms) -> Tensor:
    """Return log pi - log pi_old [B, T], 0 where a token is kept out: a NaN there (a code that was
    never taken) must reach neither the loss nor the gradient."""
    return torch.where(terms.keep_mask, terms.logprobs - terms.old_logprobs, 0.0)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Return exp(min(log_ratio, MAX_LOG_RATIO))."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def per_token_advantages(terms: PolicyTerms) -> Tensor:
    """Return the advantages as [B, 1] or [B, T]."""
    return terms.advantages[:, None] if terms.advantages.ndim == 1 else terms.advantages


def with_kl(per_token: Tensor, terms: PolicyTerms, beta: float) -> Tensor:
    """Return per_token + beta * kl [B, T], 0 where a token is kept out."""
    if beta and terms.kl is not None:
        per_token = per_token + beta * torch.where(terms.keep_mask, terms.kl, 0.0)
    return torch.where(terms.keep_mask, per_token, 0.0)


def surrogate(
    terms: PolicyTerms, *, clip: ClipRange, beta: float, ratio: RatioLevel | None = None
) -> Surrogate:
    """Return the clipped objective per token (PPO, arXiv 1707.06347, eq. 7), plus beta * kl.

    ratio: token by token if None. A completion's ratio counts for each of its tokens.

    Raises:
        ValueError: shapes that do not match, or beta without kl.
    """
    check_terms(terms, beta)
    keep, advantages = terms.keep_mask, per_token_advantages(terms)
    weight = bounded_exp((ratio or TokenRatio())(kept_log_ratio(terms), keep))
    clipped = weight.clamp(1 - clip.low, 1 + clip.high)
    bounded = weight if clip.delta is None else weight.clamp(max=clip.delta)
    per_token = -torch.min(bounded * advantages, clipped * advantages)
    count = keep.sum().clamp(min=1)
    with torch.no_grad():
        low = (weight < 1 - clip.low) & (advantages < 0) & keep
        high = (weight > 1 + clip.high) & (advantages > 0) & keep
    return Surrogate(with_kl(per_token, terms, beta), low.sum() / count, high.sum() / count)
