"""Stopping a run whose loss or gradient is not finite or explodes, before the update is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_rl.train.checkpoint_files import write_json, write_tensors

__all__ = ["BadBatch", "Limits", "TrainingDivergedError", "UpdateWatch", "save_bad_batch"]

MAX_SKIPPED = 20
"""Updates in a row that a gradient scaler may skip: it halves the scale each time, so that it has
fallen from the usual 2^16 to far below 1 by then, and the gradient itself cannot be finite."""

ADVICE = (
    "Look at the batch first: prompts, rewards, advantages. If it is sound, lower learning_rate "
    "or max_grad_norm, raise beta, or use bf16 or float32 in the place of fp16; then resume from "
    "the last checkpoint"
)


class TrainingDivergedError(FloatingPointError):
    """The loss or the gradient of an update was not finite or beyond a limit; the update was not
    made."""


@dataclass(frozen=True)
class Limits:
    """What stops a run; None is no limit."""

    stop_on_nan: bool = True
    max_loss: float | None = None
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class BadBatch:
    """The update that stopped a run.

    reason         one clause
    losses         one per micro-batch of this process, as they stand (not divided by accumulation)
    grad_norm      before clipping
    batches        what the trainer gave for each micro-batch
    """

    reason: str
    losses: list[float]
    grad_norm: float
    batches: list[Any]


@dataclass
class UpdateWatch:
    """Collects the micro-batches of an update and judges them before the optimiser steps.

    Nothing is read back from the device until `judge`, which reads once. gather concatenates a
    tensor [n] of every process, so that all of them come to the same verdict.
    """

    limits: Limits
    gather: Callable[[Tensor], Tensor]
    _losses: list[Tensor] = field(default_factory=list)
    _batches: list[Any] = field(default_factory=list)
    _skipped: int = 0

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Any, loss: Tensor) -> None:
        """Note a micro-batch: anything that describes it, and its loss []."""
        self._batches.append(batch)
        self._losses.append(loss.detach())

    def clear(self) -> None:
        """Forget an update that was not finished."""
        self._losses.clear()
        self._batches.clear()

    def judge(self, grad_norm: Tensor, *, scaled: bool) -> BadBatch | None:
        """Return what is wrong with the update, or None, and begin the next.

        grad_norm  [] of the whole gradient, before clipping
        scaled     whether a gradient scaler is at work: it then skips an update whose gradient
                   overflowed and lowers its scale, which is no failure
        """
        losses = torch.stack(self._losses).float()
        # NaN survives max, infinity too.
        mine = torch.stack([losses.abs().max(), grad_norm.detach().to(losses)])
        everyone = self.gather(mine).view(-1, 2).max(0).values
        *losses_here, norm_here, loss, norm = torch.cat([losses, mine[1:], everyone]).tolist()
        batches = list(self._batches)
        self.clear()
        reason = self._reason(loss, norm, scaled=scaled)
        return None if reason is None else BadBatch(reason, losses_here, norm_here, batches)

    def _reason(self, loss: float, norm: float, *, scaled: bool) -> str | None:
        limits = self.limits
        overflow = scaled and math.isfinite(loss) and not math.isfinite(norm)
        self._skipped = self._skipped + 1 if overflow else 0
        if limits.stop_on_nan:
            if not math.isfinite(loss):
                return f"the loss is {loss}"
            if overflow and self._skipped >= MAX_SKIPPED:
                return f"the gradient was not finite in {MAX_SKIPPED} updates in a row"
            if not math.isfinite(norm) and not overflow:
                return f"the gradient's norm is {norm} though the loss is finite"
        if limits.max_loss is not None and loss > limits.max_loss:
            return f"the loss has the size {loss:.6g}, above max_loss={limits.max_loss:g}"
        if limits.max_grad_norm is not None and not overflow and norm > limits.max_grad_norm:
            return (
                f"the gradient's norm is {norm:.6g}, above "
                f"max_grad_norm_before_stop={limits.max_grad_norm:g}"
            )
        return None


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradient holds NaN or infinity."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]


def save_bad_batch(
    stem: Path,
    bad: BadBatch,
    *,
    step: int,
    parameters: Sequence[str] | None,
    described: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]],
) -> TrainingDivergedError:
    """Write `stem`.safetensors and `stem`.json, and return the error to raise.

    parameters  names with a gradient that is not finite; None where it cannot be known
    described   per micro-batch: tensors, and values for JSON (numbers that are not finite become
                strings)
    """
    tensors = {
        f"{index}.{name}": value.detach().cpu().clone()
        for index, (values, _) in enumerate(described)
        for name, value in values.items()
    }
    record = {
        "format": 1,
        "step": step,
        "reason": bad.reason,
        "grad_norm": bad.grad_norm,
        "parameters_with_non_finite_gradients": None if parameters is None else list(parameters),
        "micro_batches": [
            {"loss": loss, **values}
            for loss, (_, values) in zip(bad.losses, described, strict=True)
        ],
    }
    where = f"The batch lies in {stem}.json and {stem}.safetensors"
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(stem.with_name(f"{stem.name}.safetensors"), tensors)
        write_json(stem.with_name(f"{stem.name}.json"), _plain(record))
    except OSError as error:
        where = f"The batch could not be saved ({error})"
    names = ""
    if parameters:
        more = f" and {len(parameters) - 3} more" if len(parameters) > 3 else ""
        names = f" Gradients are not finite in {', '.join(parameters[:3])}{more}."
    return TrainingDivergedError(
        f"update {step} was not made: {bad.reason}.{names} {where}. {ADVICE}"
    )


def _plain(value: Any) -> Any:
    """Values for JSON, which knows no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
