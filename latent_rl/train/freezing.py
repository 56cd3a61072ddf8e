"""Choosing what trains, by module identity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

__all__ = ["FreezeReport", "Trainable", "freeze", "set_training_modes"]

Trainable = nn.Module | nn.Parameter


class FreezeReport(NamedTuple):
    """Numbers of parameters (elements) that train and in all."""

    trainable: int
    total: int


def freeze(model: nn.Module, trainable: Iterable[Trainable]) -> FreezeReport:
    """Make exactly the parameters of `trainable` require gradients, every other one of `model` not.

    Raises:
        ValueError: an entry is not part of `model`, or nothing is left to train.
    """
    owned = {id(module) for module in model.modules()}
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    chosen: set[int] = set()
    for entry in trainable:
        if isinstance(entry, nn.Module):
            if id(entry) not in owned:
                raise ValueError(f"freeze: {type(entry).__name__} is not part of the model")
            chosen.update(id(parameter) for parameter in entry.parameters())
        elif id(entry) in parameters:
            chosen.add(id(entry))
        else:
            raise ValueError(
                f"freeze: a parameter of shape {tuple(entry.shape)} is not part of the model"
            )
    if not chosen:
        raise ValueError("freeze: nothing to train, the given modules hold no parameters")
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in chosen)
    counts = [(key in chosen, parameter.numel()) for key, parameter in parameters.items()]
    return FreezeReport(
        sum(size for picked, size in counts if picked), sum(size for _, size in counts)
    )


def set_training_modes(model: nn.Module, trainable: Iterable[Trainable]) -> None:
    """Put `model` into eval mode and the trainable modules into train mode.

    Dropout of frozen parts would make the cached hidden states of one batch differ from the next,
    and a frozen codebook in train mode would still move its running averages.
    """
    training = [entry for entry in trainable if isinstance(entry, nn.Module)]
    # Called at every micro-batch: looking takes a third of the time of setting.
    if training or any(module.training for module in model.modules()):
        model.eval()
    for entry in training:
        entry.train()
