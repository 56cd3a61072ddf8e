"""Policy-gradient losses: one pure function per algorithm, and their registry."""

from latent_rl.train.losses.algorithm import Algorithm, Defaults
from latent_rl.train.losses.bnpo import BNPO, bnpo_loss
from latent_rl.train.losses.dapo import DAPO, dapo_loss
from latent_rl.train.losses.dr_grpo import DrGRPO, dr_grpo_loss
from latent_rl.train.losses.grpo import GRPO, grpo_loss
from latent_rl.train.losses.objective import (
    ClipRange,
    LossSettings,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    ValueTerms,
    surrogate,
)
from latent_rl.train.losses.ratios import (
    RATIO_LEVELS,
    RatioLevel,
    SequenceRatio,
    TokenRatio,
    ratio_level,
)
from latent_rl.train.losses.registry import ALGORITHMS, algorithm, register_algorithm

__all__ = [
    "ALGORITHMS",
    "BNPO",
    "DAPO",
    "GRPO",
    "RATIO_LEVELS",
    "Algorithm",
    "ClipRange",
    "Defaults",
    "DrGRPO",
    "LossSettings",
    "Normaliser",
    "PolicyLoss",
    "PolicyTerms",
    "RatioLevel",
    "SequenceRatio",
    "TokenRatio",
    "ValueTerms",
    "algorithm",
    "bnpo_loss",
    "dapo_loss",
    "dr_grpo_loss",
    "grpo_loss",
    "ratio_level",
    "register_algorithm",
    "surrogate",
]
