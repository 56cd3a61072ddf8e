"""Checkpoints of trainers: what trains plus optimiser state, complete or not there at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latent_rl.models import load_into
from latent_rl.train.checkpoint_files import read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = [
    "COMPLETE_MARK",
    "discard_incomplete",
    "is_complete",
    "latest_checkpoint",
    "load_model",
    "mark_complete",
    "save_model",
]

COMPLETE_MARK = "checkpoint_complete.json"
"""Written last into a checkpoint directory; a directory without it was interrupted."""

TUNED_BACKBONE = "tuned_backbone.safetensors"
PREFIX = "checkpoint-"


def save_model(model: LatentActionModel, directory: Path) -> None:
    """Write the latent modules, and the backbone parameters that train (if any), into
    `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tuned = {
        name: parameter
        for name, parameter in model.backbone.named_parameters()
        if parameter.requires_grad
    }
    if tuned:
        write_tensors(directory / TUNED_BACKBONE, tuned)


def load_model(model: LatentActionModel, directory: Path) -> None:
    """Load what `save_model` wrote into an existing model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is corrupt or does not fit the model.
    """
    load_into(model, directory)
    tuned_path = directory / TUNED_BACKBONE
    if not tuned_path.exists():
        return
    parameters = dict(model.backbone.named_parameters())
    for name, tensor in read_tensors(tuned_path).items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(f"{tuned_path} does not fit the model: {name} {tuple(tensor.shape)}")
        with torch.no_grad():
            parameters[name].copy_(tensor)


def mark_complete(directory: Path, content: Mapping[str, Any]) -> None:
    """Declare a checkpoint directory whole; call this after everything else is written."""
    write_json(directory / COMPLETE_MARK, content)


def is_complete(directory: Path) -> bool:
    """Return whether a checkpoint directory was written to its end."""
    return (directory / COMPLETE_MARK).is_file()


def _step(directory: Path) -> int:
    suffix = directory.name.removeprefix(PREFIX)
    return int(suffix) if suffix.isdigit() else -1


def latest_checkpoint(output_dir: Path) -> Path | None:
    """Return the complete checkpoint of the highest step in `output_dir`, or None."""
    candidates = [path for path in output_dir.glob(f"{PREFIX}*") if is_complete(path)]
    return max(candidates, key=_step, default=None)


def discard_incomplete(directory: Path) -> None:
    """Remove the remains of an interrupted save so that a new one never mixes with them."""
    if directory.exists() and not is_complete(directory):
        shutil.rmtree(directory)
