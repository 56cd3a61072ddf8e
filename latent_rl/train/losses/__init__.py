"""Policy-gradient losses: one pure function per algorithm, and their registry."""

from latent_rl.train.losses.bnpo import BNPO, bnpo_loss
from latent_rl.train.losses.dapo import DAPO, dapo_loss
from latent_rl.train.losses.dr_grpo import DrGRPO, dr_grpo_loss
from latent_rl.train.losses.grpo import GRPO, grpo_loss
from latent_rl.train.losses.objective import (
    Algorithm,
    ClipRange,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    surrogate,
)
from latent_rl.train.losses.registry import ALGORITHMS, algorithm, register_algorithm

__all__ = [
    "ALGORITHMS",
    "BNPO",
    "DAPO",
    "GRPO",
    "Algorithm",
    "ClipRange",
    "DrGRPO",
    "Normaliser",
    "PolicyLoss",
    "PolicyTerms",
    "algorithm",
    "bnpo_loss",
    "dapo_loss",
    "dr_grpo_loss",
    "grpo_loss",
    "register_algorithm",
    "surrogate",
]
