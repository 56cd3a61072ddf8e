"""Training: the stages, their trainer, and reinforcement learning over latent actions."""

from latent_rl.train.feature_cache import (
    CachedRow,
    FeatureCache,
    build_feature_cache,
    collate_features,
)
from latent_rl.train.features import trace_of
from latent_rl.train.freezing import FreezeReport, freeze
from latent_rl.train.losses import ALGORITHMS, algorithm, register_algorithm
from latent_rl.train.rl_config import LatentGRPOConfig
from latent_rl.train.rl_trainer import LatentGRPOTrainer
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
    "ALGORITHMS",
    "BehaviourCloning",
    "CachedRow",
    "CosineSchedule",
    "FeatureCache",
    "FreezeReport",
    "InverseWarmup",
    "Joint",
    "LatentGRPOConfig",
    "LatentGRPOTrainer",
    "ProjectorWarmup",
    "Stage",
    "StageArguments",
    "StageOutput",
    "StageTrainer",
    "TaskSFT",
    "algorithm",
    "build_feature_cache",
    "collate_features",
    "freeze",
    "register_algorithm",
    "trace_of",
]
