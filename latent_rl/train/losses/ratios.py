"""Importance ratios: one per token, or one per completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["RATIO_LEVELS", "RatioLevel", "SequenceRatio", "TokenRatio", "ratio_level"]


class RatioLevel(Protocol):
    """What an importance ratio belongs to."""

    def __call__(self, log_ratio: Tensor, keep_mask: Tensor) -> Tensor:
        """log_ratio [B, T] (0 where keep_mask [B, T] is False) -> log weights, [B, T] or [B, 1]."""
        ...


@dataclass(frozen=True)
class TokenRatio:
    """Each token its own ratio pi(a_t) / pi_old(a_t) (PPO, arXiv 1707.06347)."""

    def __call__(self, log_ratio: Tensor, keep_mask: Tensor) -> Tensor:
        return log_ratio


@dataclass(frozen=True)
class SequenceRatio:
    """One ratio per completion, (pi(a_1..a_T) / pi_old(a_1..a_T))^(1/T) (GSPO, arXiv 2507.18071,
    eq. 7): the mean of the log ratios over the T kept tokens."""

    def __call__(self, log_ratio: Tensor, keep_mask: Tensor) -> Tensor:
        kept = torch.where(keep_mask, log_ratio, 0.0)
        return kept.sum(-1, keepdim=True) / keep_mask.sum(-1, keepdim=True).clamp(min=1)


RATIO_LEVELS: Mapping[str, RatioLevel] = MappingProxyType(
    {"token": TokenRatio(), "sequence": SequenceRatio()}
)


def ratio_level(name: str) -> RatioLevel:
    """Return the level of TRL's `importance_sampling_level` name. Raises ValueError for an unknown
    one."""
    if name not in RATIO_LEVELS:
        raise ValueError(
            f"importance_sampling_level must be one of {sorted(RATIO_LEVELS)}, got {name!r}"
        )
    return RATIO_LEVELS[name]
