"""DAPO's dynamic sampling: prompts that teach nothing make room for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from latent_rl.train.advantages import RewardScale
from latent_rl.train.rollout import Rollout, join_rollouts

__all__ = ["Resampled", "resampled_rollout"]


class Resampled(NamedTuple):
    """A rollout, and how many rounds of replacement it took."""

    rollout: Rollout
    rounds: int


def resampled_rollout(
    numbers: Sequence[int],
    *,
    roll_out: Callable[[Sequence[int], int, Sequence[Rollout]], Rollout],
    other_prompts: Callable[[int, int], list[int]],
    group_size: int,
    scale: RewardScale,
    rounds: int,
) -> Resampled:
    """Return a rollout of as many rows as `numbers`, its groups without a difference in reward
    replaced in at most `rounds` rounds (arXiv 2503.14476, sec. 3.2).

    What is then still missing is filled with such groups. With 0 rounds it is one plain rollout.

    numbers: row numbers, `group_size` of each prompt. roll_out: (numbers, round, the parts held so
    far) -> rollout. other_prompts: (how many, round) -> numbers.
    """
    wanted = len(numbers)
    parts: list[Rollout] = []
    for attempt in range(rounds + 1):
        rollout = roll_out(numbers, attempt, parts)
        informative = rollout.informative_groups(group_size, scale)
        missing = wanted - sum(len(part) for part in parts)
        if attempt == rounds or int(informative.sum()) * group_size >= missing:
            order = torch.argsort(~informative, stable=True)[: missing // group_size]
            parts.append(rollout.select_groups(order.sort().values, group_size))
            break
        if informative.any():
            parts.append(rollout.select_groups(informative.nonzero()[:, 0], group_size))
        missing = wanted - sum(len(part) for part in parts)
        numbers = other_prompts(missing // group_size, attempt)
    return Resampled(join_rollouts(parts), attempt)
