"""The rewards of a run: its functions, what they log, and whether too many fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from latent_rl.rewards import RewardFunction, RewardLog, resolve_rewards
from latent_rl.train.failure_watch import FailureWatch
from latent_rl.train.stateful import Stateful, StatefulParts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from latent_rl.train.rl_config import LatentGRPOConfig

__all__ = ["Reward", "RunRewards"]

Reward: TypeAlias = "RewardFunction | PreTrainedModel | nn.Module | str"
"""A function, a reward model, or the name of one."""


class RunRewards:
    """What a trainer keeps of its rewards.

    functions  one callable per reward, models on the run's device
    log        what they log beside their values
    failures   the watch that stops the run

    Raises:
        ValueError: weights or processing classes that do not match the rewards.
    """

    def __init__(
        self, rewards: Reward | Sequence[Reward], processing_classes: Any, args: LatentGRPOConfig
    ) -> None:
        self.functions = resolve_rewards(rewards, processing_classes, args.device)
        if args.reward_weights is not None and len(args.reward_weights) != len(self.functions):
            raise ValueError(
                f"LatentGRPOTrainer: reward_weights must have one entry per reward function "
                f"({len(self.functions)}), got {len(args.reward_weights)}"
            )
        self.log = RewardLog()
        self.failures = FailureWatch(args.max_reward_failure_rate, args.reward_failure_window)

    def carry_in(self, parts: StatefulParts) -> None:
        """Have checkpoints carry the watch, and what rewards remember (a judge: its spending)."""
        parts.add("failures", self.failures, per_rank=True)
        for index, function in enumerate(self.functions):
            if isinstance(function, Stateful):
                parts.add(f"reward_{index}", function, per_rank=True)
