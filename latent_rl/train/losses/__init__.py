"""Policy-gradient losses: one pure function per algorithm, and their registry."""

from latent_rl.train.losses.algorithm import CHOICES, GROUP_CHOICES, Algorithm, Defaults
from latent_rl.train.losses.bnpo import BNPO, bnpo_loss
from latent_rl.train.losses.cispo import CISPO, cispo_loss
from latent_rl.train.losses.dapo import DAPO, dapo_loss
from latent_rl.train.losses.dr_grpo import DrGRPO, dr_grpo_loss
from latent_rl.train.losses.grpo import GRPO, grpo_loss
from latent_rl.train.losses.gspo import GSPO, gspo_loss
from latent_rl.train.losses.luspo import LUSPO, luspo_loss
from latent_rl.train.losses.objective import (
    ClipRange,
    GammaWeights,
    LossSettings,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    SoftGate,
    ValueTerms,
    surrogate,
)
from latent_rl.train.losses.ppo import PPO, ppo_loss, value_loss
from latent_rl.train.losses.ratios import (
    RATIO_LEVELS,
    RatioLevel,
    SequenceRatio,
    TokenRatio,
    ratio_level,
)
from latent_rl.train.losses.registry import ALGORITHMS, algorithm, register_algorithm
from latent_rl.train.losses.reinforce_plus_plus import (
    ReinforcePlusPlus,
    reinforce_plus_plus_loss,
)
from latent_rl.train.losses.rloo import RLOO, rloo_loss
from latent_rl.train.losses.sapo import SAPO, sapo_loss
from latent_rl.train.losses.vespo import VESPO, vespo_loss

__all__ = [
    "ALGORITHMS",
    "BNPO",
    "CHOICES",
    "CISPO",
    "DAPO",
    "GROUP_CHOICES",
    "GRPO",
    "GSPO",
    "LUSPO",
    "PPO",
    "RATIO_LEVELS",
    "RLOO",
    "SAPO",
    "VESPO",
    "Algorithm",
    "ClipRange",
    "Defaults",
    "DrGRPO",
    "GammaWeights",
    "LossSettings",
    "Normaliser",
    "PolicyLoss",
    "PolicyTerms",
    "RatioLevel",
    "ReinforcePlusPlus",
    "SequenceRatio",
    "SoftGate",
    "TokenRatio",
    "ValueTerms",
    "algorithm",
    "bnpo_loss",
    "cispo_loss",
    "dapo_loss",
    "dr_grpo_loss",
    "grpo_loss",
    "gspo_loss",
    "luspo_loss",
    "ppo_loss",
    "ratio_level",
    "register_algorithm",
    "reinforce_plus_plus_loss",
    "rloo_loss",
    "sapo_loss",
    "surrogate",
    "value_loss",
    "vespo_loss",
]
