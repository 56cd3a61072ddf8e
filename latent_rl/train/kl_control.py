"""The weight of the KL to the reference, fixed or steered to a target; moving the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["AdaptiveKL", "FixedKL", "KLController", "ReferenceSync"]

MAX_ERROR = 0.2
"""The proportional error is cut to +-0.2, so that one step cannot move beta far."""


class KLController(Protocol):
    """Chooses beta. A stateful part of a run."""

    @property
    def beta(self) -> float: ...

    @property
    def adapts(self) -> bool:
        """Whether `update` does anything, so that nobody measures for nothing."""
        ...

    def update(self, kl: float, completions: int) -> None:
        """Take note of the mean KL per kept code (nats) of an optimizer step on so many
        completions."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None: ...


class FixedKL:
    """The same beta throughout."""

    adapts = False

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def update(self, kl: float, completions: int) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember: beta is a setting."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Nothing to take over."""


class AdaptiveKL:
    """Steers beta so that the KL comes to a target (Ziegler et al., arXiv 1909.08593, sec. 2.2):

        error = clip(kl / target - 1, -0.2, 0.2)
        beta <- beta * (1 + error * completions / horizon)

    Unlike there, kl is the mean per kept code, the `kl` of the logs, and not the sum over a
    completion: the target then does not depend on how long completions are.
    """

    adapts = True

    def __init__(self, beta: float, target: float, horizon: int) -> None:
        """Raises ValueError unless all three are positive (a beta of 0 would stay 0)."""
        for name, value in (("beta", beta), ("target_kl", target), ("kl_horizon", horizon)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0 with a KL target, got {value}")
        self.beta = beta
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, completions: int) -> None:
        """See the class."""
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.beta *= 1 + error * completions / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """The current beta; target and horizon are settings."""
        return {"beta": self.beta}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Go on with the saved beta."""
        self.beta = float(state_dict["beta"])


@dataclass(frozen=True)
class ReferenceSync:
    """Every `steps` optimizer steps the reference moves towards the policy (TR-DPO, arXiv
    2404.09656): ref <- alpha * policy + (1 - alpha) * ref. TRL's `sync_ref_model`.

    Raises ValueError for alpha outside (0, 1] or steps < 1.
    """

    alpha: float = 0.6
    steps: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {self.alpha}")
        if self.steps < 1:
            raise ValueError(f"ref_model_sync_steps must be >= 1, got {self.steps}")

    @torch.no_grad()
    def __call__(self, policy: nn.Module, reference: nn.Module, step: int) -> bool:
        """Move `reference` if `step` is due, and return whether it was."""
        if step % self.steps:
            return False
        for moving, target in zip(reference.parameters(), policy.parameters(), strict=True):
            moving.mul_(1 - self.alpha).add_(target.to(moving), alpha=self.alpha)
        return True
