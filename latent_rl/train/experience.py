"""A rollout, its scores and a run's settings as what advantages are made of."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from latent_rl.train.algorithm_settings import AlgorithmSettings
from latent_rl.train.estimators import ScoredRollout
from latent_rl.train.rollout import Rollout
from latent_rl.train.scoring import RolloutScores

__all__ = ["scored_rollout"]


def scored_rollout(
    rollout: Rollout,
    token_mask: Tensor,
    scores: RolloutScores,
    settings: AlgorithmSettings,
    beta: float,
    gather: Callable[[Tensor], Tensor],
) -> ScoredRollout:
    """Return the rollout with its rewards shaped and, where the KL is part of the reward, its
    penalty beta * log(pi / pi_ref) [B, T].

    token_mask: [B, T] bool, True where a token takes part in the loss. gather: concatenates a
    tensor [n, ...] of every process.

    Raises:
        ValueError: scores without the log ratio that the penalty needs.
    """
    penalty = None
    if settings.puts_kl_in_reward():
        if scores.log_ratio is None:
            raise ValueError("scored_rollout: scores.log_ratio is needed, got None")
        penalty = beta * scores.log_ratio
    shape = settings.reward_shaping()
    return ScoredRollout(
        rewards=shape(rollout.rewards, rollout.completion_mask.sum(1), rollout.terminated),
        keep_mask=rollout.keep_mask,
        token_mask=token_mask,
        group_size=settings.num_generations,
        penalty=penalty,
        values=scores.values,
        gather=gather,
    )
