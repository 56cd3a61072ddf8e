"""The distribution codes are sampled from, so that what is sampled is what is scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SampledDistribution", "mix_seed"]

_MASK = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """Hash integers into one seed in [0, 2^63), by splitmix64 steps."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class SampledDistribution:
    """Temperature and truncation of `ops.sample_codes`, for scoring.

    A policy-gradient loss must use the probability with which a code was really drawn. Truncation
    makes that probability depend on which codes were kept *when sampling*; `support` says which
    those were from the logits of that time, and `scaled_logits` scores later logits within that
    same set.

    Raises ValueError for a temperature that is not positive (a greedy choice has no gradient).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0 for training, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")

    @property
    def truncates(self) -> bool:
        """Whether some codes may be excluded."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @torch.no_grad()
    def support(self, logits: Tensor, codes: Tensor) -> Tensor | None:
        """Return bool [..., K], True for the codes that could be drawn from logits [..., K]; None
        when nothing is truncated.

        Temperature, then top_k, top_p, min_p, each on what the one before left; ties at a boundary
        keep the lowest ids, as in `ops.sample_codes`. The drawn codes [...] (-1: none) always
        belong to it: a rollout in another precision may have seen the boundary elsewhere.
        """
        if not self.truncates:
            return None
        scaled = logits.float() / self.temperature
        values, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
        kept = values > -torch.inf
        if self.top_k:
            kept &= torch.arange(values.shape[-1], device=values.device) < self.top_k
        if self.top_p < 1:
            probs = values.masked_fill(~kept, -torch.inf).softmax(-1)
            # A code is needed while the mass before it has not reached top_p.
            kept &= probs.cumsum(-1) - probs < self.top_p
        if self.min_p > 0:
            probs = values.masked_fill(~kept, -torch.inf).softmax(-1)
            kept &= probs >= self.min_p * probs[..., :1]
        support = torch.zeros_like(kept).scatter(-1, order, kept)
        drawn = codes.clamp(min=0)[..., None]
        return support.scatter(-1, drawn, support.gather(-1, drawn) | (codes >= 0)[..., None])

    def scaled_logits(self, logits: Tensor, support: Tensor | None) -> Tensor:
        """Return logits / temperature with -inf outside the support; softmax of it is the
        distribution sampled from. The very tensor given if there is nothing to do."""
        scaled = logits if self.temperature == 1 else logits / self.temperature
        return scaled if support is None else scaled.masked_fill(~support, -torch.inf)
