"""Training: the stages, their trainer, and reinforcement learning over latent actions."""

from latent_rl.train.arms import Arm, ArmJob, ArmRun, LatentArm, Sweep, TokenArm, run_arm, sweep
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
from latent_rl.train.spending import Spending, SpendingMeter, spending_of
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
from latent_rl.train.token_config import TOKEN_ALGORITHMS, TOKEN_MAPPING, token_arguments
from latent_rl.train.token_trainer import token_trainer

__all__ = [
    "ALGORITHMS",
    "TOKEN_ALGORITHMS",
    "TOKEN_MAPPING",
    "Arm",
    "ArmJob",
    "ArmRun",
    "BehaviourCloning",
    "CachedRow",
    "CosineSchedule",
    "FeatureCache",
    "FreezeReport",
    "InverseWarmup",
    "Joint",
    "LatentArm",
    "LatentGRPOConfig",
    "LatentGRPOTrainer",
    "ProjectorWarmup",
    "Spending",
    "SpendingMeter",
    "Stage",
    "StageArguments",
    "StageOutput",
    "StageTrainer",
    "Sweep",
    "TaskSFT",
    "TokenArm",
    "algorithm",
    "build_feature_cache",
    "collate_features",
    "freeze",
    "register_algorithm",
    "run_arm",
    "spending_of",
    "sweep",
    "token_arguments",
    "token_trainer",
    "trace_of",
]
