"""Rewards: the protocol (TRL's), how several are combined, and programmatic ones to build on."""

from latent_rl.rewards.batteries import Gated, NamesTheFact, WellFormed
from latent_rl.rewards.failures import RewardFailure, RewardStop, count_by_kind, failure_kind
from latent_rl.rewards.form import (
    IsJson,
    LengthRange,
    MatchesPattern,
    OverlongPenalty,
    RepetitionPenalty,
    Tagged,
)
from latent_rl.rewards.matching import (
    COMPARISONS,
    ContainsAnswer,
    ExactAnswer,
    F1Answer,
    GroundedFacts,
    MatchesAnswer,
    NumberAnswer,
)
from latent_rl.rewards.persona import PersonaMarkers
from latent_rl.rewards.protocol import (
    Completion,
    RewardFunction,
    RewardOutput,
    RewardTable,
    RewardValue,
    reward_name,
    score_all,
)
from latent_rl.rewards.reward_log import RewardLog
from latent_rl.rewards.reward_model import NamedRewardModel, RewardModel, resolve_rewards
from latent_rl.rewards.rows import score_rows
from latent_rl.rewards.text import completion_text

__all__ = [
    "COMPARISONS",
    "Completion",
    "ContainsAnswer",
    "ExactAnswer",
    "F1Answer",
    "Gated",
    "GroundedFacts",
    "IsJson",
    "LengthRange",
    "MatchesAnswer",
    "MatchesPattern",
    "NamedRewardModel",
    "NamesTheFact",
    "NumberAnswer",
    "OverlongPenalty",
    "PersonaMarkers",
    "RepetitionPenalty",
    "RewardFailure",
    "RewardFunction",
    "RewardLog",
    "RewardModel",
    "RewardOutput",
    "RewardStop",
    "RewardTable",
    "RewardValue",
    "Tagged",
    "WellFormed",
    "completion_text",
    "count_by_kind",
    "failure_kind",
    "resolve_rewards",
    "reward_name",
    "score_all",
    "score_rows",
]
