"""What holds the policy back during the updates: the KL's weight, its reference, the entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from latent_rl.train.algorithm_settings import AlgorithmSettings
from latent_rl.train.losses import PolicyTerms

__all__ = ["Regularisation"]


class Regularisation(TrainerCallback):
    """Measures the KL of every optimizer step, steers beta by it, moves the reference.

    controller is the stateful part. With a fixed beta nothing is measured.
    """

    def __init__(
        self,
        settings: AlgorithmSettings,
        policy: nn.Module,
        reference: nn.Module | None,
        gather: Callable[[Tensor], Tensor],
    ) -> None:
        """gather: concatenates a tensor [n, ...] of every process."""
        self._settings = settings
        self.controller = settings.kl_controller()
        self._sync = settings.reference_sync()
        self._entropy_coef = settings.entropy_coefficient()
        self._uses_entropy = settings.uses_entropy()
        self._policy = policy
        self._reference = reference
        self._gather = gather
        self._measured: Tensor | None = None

    def reset(self) -> None:
        """Begin a new run: beta as it was set."""
        self.controller.load_state_dict(self._settings.kl_controller().state_dict())
        self._measured = None

    @property
    def beta(self) -> float:
        """The KL's weight now."""
        return self.controller.beta

    @torch.no_grad()
    def note(self, terms: PolicyTerms) -> None:
        """Count a micro-batch's KL towards that of its optimizer step."""
        if terms.kl is None or not self.controller.adapts:
            return
        keep = terms.keep_mask
        total = torch.where(keep, terms.kl, 0.0).double().sum()
        sums = torch.stack([total, keep.sum().double(), keep.any(1).sum().double()])
        self._measured = sums if self._measured is None else self._measured + sums

    def entropy_bonus(
        self, entropy: Tensor, keep_mask: Tensor, progress: float
    ) -> tuple[Tensor | None, dict[str, float]]:
        """Return what the loss is to be reduced by [], or None, and what to log.

        The bonus is the coefficient times the mean entropy [B, T] over the kept codes of the
        micro-batch, whatever the algorithm divides by, as in TRL. progress: share of the run that
        is over.
        """
        if not self._uses_entropy:
            return None, {}
        coefficient = self._entropy_coef(progress)
        mean = torch.where(keep_mask, entropy, 0.0).sum() / keep_mask.sum().clamp(min=1)
        return coefficient * mean, {"entropy_coef": coefficient}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Steer beta by the step's KL over all processes; move the reference if it is due."""
        if self._measured is not None:
            total, tokens, completions = self._gather(self._measured[None]).sum(0).tolist()
            self._measured = None
            if tokens:
                self.controller.update(total / tokens, int(completions))
        if self._sync is not None and self._reference is not None:
            self._sync(self._policy, self._reference, state.global_step)
