"""Training: the stages, their trainer, and reinforcement learning over latent actions."""

from latent_rl.train.feature_cache import (
    CachedRow,
    FeatureCache,
    build_feature_cache,
    collate_features,
)
from latent_rl.train.features import trace_of
from latent_rl.train.freezing import FreezeReport, freeze
from latent_rl.train.stage_trainer import StageArguments, StageTrainer
from latent_rl.train.stages import (
    BehaviourCloning,
    CosineSchedule,
    InverseWarmup,
    Joint,
    ProjectorWarmup,
    Stage,
    StageOutput,
    TaskSFT,
)

__all__ = [
    "BehaviourCloning",
    "CachedRow",
    "CosineSchedule",
    "FeatureCache",
    "FreezeReport",
    "InverseWarmup",
    "Joint",
    "ProjectorWarmup",
    "Stage",
    "StageArguments",
    "StageOutput",
    "StageTrainer",
    "TaskSFT",
    "build_feature_cache",
    "collate_features",
    "freeze",
    "trace_of",
]
