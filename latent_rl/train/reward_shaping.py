"""What a run does to rewards before they become advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RewardShaping", "soft_overlong_punishment"]


def soft_overlong_punishment(lengths: Tensor, *, max_completion_length: int, cache: int) -> Tensor:
    """Return DAPO's length penalty (arXiv 2503.14476, eq. 13), one in [-1, 0] per length.

    0 up to max_completion_length - cache tokens, then falling linearly to -1 at
    max_completion_length, -1 beyond.

    lengths: int [B], tokens of each completion. cache: L_cache >= 0, the width of the slope; 0
    punishes only what is longer than max_completion_length.

    Raises:
        ValueError: a cache that is negative or longer than max_completion_length.
    """
    if not 0 <= cache <= max_completion_length:
        raise ValueError(
            f"soft_overlong_punishment: cache must be in [0, max_completion_length "
            f"({max_completion_length})], got {cache}"
        )
    over = lengths - (max_completion_length - cache)
    if cache == 0:
        return torch.where(over > 0, -1.0, 0.0)
    return -(over.float() / cache).clamp(0, 1)


@dataclass(frozen=True)
class RewardShaping:
    """Rewards are clipped, then punished for length and for a missing end.

    clip                   (lowest, highest), TRL's `reward_clip_range`, or None
    max_completion_length  T
    soft_punish_cache      width of DAPO's overlong slope in tokens, or None for no punishment
    soft_punish_weight     the largest punishment, in units of the reward
    missing_eos_penalty    taken off where a completion was cut short, or None

    Raises ValueError for values that make no sense.
    """

    max_completion_length: int
    clip: Sequence[float] | None = None
    soft_punish_cache: int | None = None
    soft_punish_weight: float = 1.0
    missing_eos_penalty: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not (len(self.clip) == 2 and self.clip[0] < self.clip[1]):
            raise ValueError(f"reward_clip_range must be (lowest, highest), got {self.clip}")
        cache = self.soft_punish_cache
        if cache is not None and not 0 < cache <= self.max_completion_length:
            raise ValueError(
                f"soft_punish_cache must be in [1, max_completion_length "
                f"({self.max_completion_length})], got {cache}"
            )
        for name in ("soft_punish_weight", "missing_eos_penalty"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be >= 0 (it is subtracted), got {value}")

    def __call__(self, rewards: Tensor, lengths: Tensor, terminated: Tensor) -> Tensor:
        """rewards [B] float (NaN stays NaN), lengths [B] int, terminated [B] bool -> [B]."""
        if self.clip is not None:
            rewards = rewards.clamp(self.clip[0], self.clip[1])
        if self.soft_punish_cache is not None:
            punishment = soft_overlong_punishment(
                lengths,
                max_completion_length=self.max_completion_length,
                cache=self.soft_punish_cache,
            )
            rewards = rewards + self.soft_punish_weight * punishment
        if self.missing_eos_penalty is not None:
            rewards = rewards - self.missing_eos_penalty * (~terminated).to(rewards.dtype)
        return rewards
