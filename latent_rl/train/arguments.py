"""Settings that both trainers share."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import TrainingArguments

__all__ = ["BaseArguments"]

# What a name of `report_to` imports: any one of these will do.
TRACKERS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}

NOT_HERE: Mapping[str, str] = {
    "label_smoothing_factor": "losses are the stages' and the algorithms' own",
    "neftune_noise_alpha": "the backbone's embeddings are frozen, and its states are kept",
}
"""Settings of `TrainingArguments` that nothing here would read."""


@dataclass
class BaseArguments(TrainingArguments):
    """TrainingArguments plus when to stop a run that has gone wrong.

    stop_on_nan                 stop before the update when a loss or the gradient is not finite
    max_loss                    stop when the size of a micro-batch's loss exceeds this; None is
                                never
    max_grad_norm_before_stop   stop when the gradient's norm, before clipping, exceeds this; None
                                is never

    With any of them the losses and the norm are read once per update, before the optimiser steps
    (one wait for the device); the Trainer's own look at every micro-batch
    (`logging_nan_inf_filter`) is then switched off.

    Raises ImportError if `report_to` names a package that is not installed, and ValueError for
    what would change nothing here (`label_smoothing_factor`, `neftune_noise_alpha`).
    """

    stop_on_nan: bool = True
    max_loss: float | None = None
    max_grad_norm_before_stop: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        # Rows carry prompts, messages, images and traces that no forward signature names.
        self.remove_unused_columns = False
        for name in ("max_loss", "max_grad_norm_before_stop"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a positive number or None, got {value}"
                )
        for name, reason in NOT_HERE.items():
            if getattr(self, name):
                raise ValueError(
                    f"{type(self).__name__}: {name} is not supported ({reason}), "
                    f"got {getattr(self, name)}"
                )
        if self.watches_updates:
            self.logging_nan_inf_filter = False
        _require_trackers(self.report_to)

    @property
    def watches_updates(self) -> bool:
        """Whether updates are checked before they are made."""
        limits = (self.max_loss, self.max_grad_norm_before_stop)
        return self.stop_on_nan or any(limit is not None for limit in limits)


def _require_trackers(report_to: str | Iterable[str] | None) -> None:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        packages = TRACKERS.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise ImportError(
                f"report_to={name!r} needs a package that is not installed: "
                f"pip install {packages[0]}"
            )
