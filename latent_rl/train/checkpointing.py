"""Checkpoints of trainers: what trains plus optimiser state, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_rl.models import load_into

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = [
    "COMPLETE_MARK",
    "discard_incomplete",
    "is_complete",
    "latest_checkpoint",
    "load_model",
    "mark_complete",
    "read_tensors",
    "save_model",
    "write_json",
    "write_tensors",
]

COMPLETE_MARK = "checkpoint_complete.json"
"""Written last into a checkpoint directory; a directory without it was interrupted."""

TUNED_BACKBONE = "tuned_backbone.safetensors"
PREFIX = "checkpoint-"


def write_atomically(path: Path, write: Any) -> None:
    """Call write(temporary path), flush it to disk and rename it to `path`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(aside)
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    text = json.dumps(content, indent=2, sort_keys=True)
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors atomically."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda aside: save_file(contiguous, aside))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors. Raises ValueError naming the file if it is missing or corrupt."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read checkpoint file {path}: {error}") from error


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
