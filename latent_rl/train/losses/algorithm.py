"""What an algorithm is: its advantages, its loss, and the settings its paper uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from latent_rl.train.estimators import AdvantageEstimator, AdvantageSettings
from latent_rl.train.losses.objective import LossSettings, Normaliser, PolicyLoss, PolicyTerms

__all__ = ["Algorithm", "Defaults"]


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
