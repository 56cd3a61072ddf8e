"""The algorithms by name."""

from __future__ import annotations

from latent_rl.train.losses.algorithm import Algorithm
from latent_rl.train.losses.bnpo import BNPO
from latent_rl.train.losses.cispo import CISPO
from latent_rl.train.losses.dapo import DAPO
from latent_rl.train.losses.dr_grpo import DrGRPO
from latent_rl.train.losses.grpo import GRPO
from latent_rl.train.losses.gspo import GSPO
from latent_rl.train.losses.luspo import LUSPO
from latent_rl.train.losses.ppo import PPO
from latent_rl.train.losses.reinforce_plus_plus import BASELINE_DEFAULTS, ReinforcePlusPlus
from latent_rl.train.losses.rloo import RLOO
from latent_rl.train.losses.sapo import SAPO
from latent_rl.train.losses.vespo import VESPO

__all__ = ["ALGORITHMS", "algorithm", "register_algorithm"]

ALGORITHMS: dict[str, Algorithm] = {}


def register_algorithm(entry: Algorithm) -> None:
    """Add an algorithm under its name. Raises ValueError if the name is taken."""
    if entry.name in ALGORITHMS:
        raise ValueError(f"register_algorithm: {entry.name!r} is already registered")
    ALGORITHMS[entry.name] = entry


def algorithm(name: str) -> Algorithm:
    """Return the algorithm of a `loss_type` name. Raises ValueError for an unknown one."""
    if name not in ALGORITHMS:
        raise ValueError(f"loss_type must be one of {sorted(ALGORITHMS)}, got {name!r}")
    return ALGORITHMS[name]


for _entry in (
    GRPO(),
    DrGRPO(),
    DAPO(),
    BNPO(),
    GSPO(),
    CISPO(),
    RLOO(),
    ReinforcePlusPlus(),
    ReinforcePlusPlus(
        "reinforce_plus_plus_baseline", BASELINE_DEFAULTS, min_generations=2, group_baseline=True
    ),
    PPO(),
    SAPO(),
    LUSPO(),
    VESPO(),
):
    register_algorithm(_entry)
