"""What an algorithm is: its advantages, its loss, and the settings its paper uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from latent_rl.train.estimators import AdvantageEstimator, AdvantageSettings
from latent_rl.train.losses.objective import LossSettings, Normaliser, PolicyLoss, PolicyTerms

__all__ = ["CHOICES", "GROUP_CHOICES", "Algorithm", "Defaults"]

GROUP_CHOICES = frozenset(
    {"scale_rewards", "normalize_advantages", "epsilon", "delta", "importance_sampling_level"}
)
"""Settings that the clipped losses with group-relative advantages read."""

CHOICES = GROUP_CHOICES | {
    "gamma",
    "lam",
    "whiten_rewards",
    "vf_coef",
    "cliprange_value",
    "detach_value",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
}
"""Settings that mean something to some algorithms only; choosing one that the algorithm does not
read is an error."""


@dataclass(frozen=True)
class Defaults:
    """What the settings of the same names mean when a run leaves them out.

    epsilon_high: None is the same as epsilon.
    """

    scale_rewards: str = "group"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    importance_sampling_level: str = "token"
    dynamic_sampling: bool = False
    kl_in_reward: bool = False


class Algorithm(Protocol):
    """A named policy-gradient algorithm."""

    @property
    def name(self) -> str: ...

    @property
    def defaults(self) -> Defaults: ...

    @property
    def choices(self) -> frozenset[str]:
        """Which of `CHOICES` it reads."""
        ...

    @property
    def min_generations(self) -> int:
        """Fewest completions per prompt its advantages are defined for."""
        ...

    @property
    def uses_values(self) -> bool:
        """Whether it trains a value head beside the policy."""
        ...

    def estimator(self, settings: AdvantageSettings) -> AdvantageEstimator:
        """How a rollout's rewards become advantages."""
        ...

    def loss(
        self, terms: PolicyTerms, *, settings: LossSettings, normaliser: Normaliser
    ) -> PolicyLoss:
        """The loss of a micro-batch; their mean over a rollout's micro-batches is the rollout's."""
        ...
