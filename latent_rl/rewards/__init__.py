"""Rewards: the protocol (TRL's), how several are combined, and programmatic ones to build on."""

from latent_rl.rewards.batteries import Gated, NamesTheFact, WellFormed, completion_text
from latent_rl.rewards.protocol import (
    Completion,
    RewardFunction,
    RewardOutput,
    RewardTable,
    RewardValue,
    reward_name,
    score_all,
)
from latent_rl.rewards.rows import score_rows

__all__ = [
    "Completion",
    "Gated",
    "NamesTheFact",
    "RewardFunction",
    "RewardOutput",
    "RewardTable",
    "RewardValue",
    "WellFormed",
    "completion_text",
    "reward_name",
    "score_all",
    "score_rows",
]
