"""Checkpoints of trainers: what trains plus optimiser state, complete or not there at all."""

from __future__ import annotations

import json
import logging
import shutil
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latent_rl.models import load_into
from latent_rl.train.checkpoint_files import flush, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = [
    "COMPLETE_MARK",
    "CheckpointWriteError",
    "checkpoints",
    "clear_frames",
    "drop_aside",
    "is_complete",
    "latest_checkpoint",
    "load_model",
    "mark_complete",
    "put_back",
    "recover",
    "rotate",
    "save_model",
    "set_aside",
    "what_is_missing",
    "write_error",
]

logger = logging.getLogger(__name__)

COMPLETE_MARK = "checkpoint_complete.json"
"""Written last into a checkpoint directory; a directory without it was interrupted."""

TUNED_BACKBONE = "tuned_backbone.safetensors"
PREFIX = "checkpoint-"
ASIDE = ".replaced"


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
    """Declare a checkpoint directory whole; call this after everything else is written.

    The mark lists every file with its size. All of them are on disk before the mark is, so that not
    even a power failure leaves a mark without its files.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        flush(path)
        if path.is_file():
            files[path.relative_to(directory).as_posix()] = path.stat().st_size
    write_json(directory / COMPLETE_MARK, {**content, "files": files})
    flush(directory.parent)


def what_is_missing(directory: Path) -> str | None:
    """Return why a directory is no complete checkpoint, or None if it is one."""
    mark = directory / COMPLETE_MARK
    if not directory.is_dir():
        return "it does not exist"
    if not mark.is_file():
        return f"it has no {COMPLETE_MARK}, so it was interrupted while being written or removed"
    try:
        sizes = json.loads(mark.read_text(encoding="utf-8")).get("files", {})
    except (OSError, ValueError, AttributeError) as error:
        return f"its {COMPLETE_MARK} cannot be read: {error}"
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes instead of {size}"
    return None


def is_complete(directory: Path) -> bool:
    """Return whether a directory is a checkpoint with all of its files in full length."""
    return what_is_missing(directory) is None


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run by step, complete or not."""
    return sorted((p for p in run_dir.glob(f"{PREFIX}*") if _step(p) >= 0), key=_step)


def _step(directory: Path) -> int:
    suffix = directory.name.removeprefix(PREFIX)
    return int(suffix) if suffix.isdigit() else -1


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the complete checkpoint of the highest step in `run_dir`, or None.

    Incomplete ones that it passes over are named in a warning.
    """
    for directory in reversed(checkpoints(run_dir)):
        reason = what_is_missing(directory)
        if reason is None:
            return directory
        logger.warning("%s is no complete checkpoint and is passed over: %s", directory, reason)
    return None


def remove(directory: Path) -> None:
    """Remove a checkpoint so that it is complete or not at every moment, and never looks whole when
    it is not: its mark goes first."""
    mark = directory / COMPLETE_MARK
    if mark.is_file():
        mark.unlink()
        flush(directory)
    shutil.rmtree(directory)


def rotate(run_dir: Path, limit: int | None, keep: Sequence[Path]) -> None:
    """Remove the oldest checkpoints beyond `limit` (None or 0: no limit), and incomplete ones.

    keep: never removed, and counted; the one just written and the best. What cannot be removed is
    named in a warning: the run goes on.
    """
    if not limit:
        return
    kept = {path.resolve() for path in keep}
    others = [path for path in checkpoints(run_dir) if path.resolve() not in kept]
    broken = [path for path in others if not is_complete(path)]
    whole = [path for path in others if path not in broken]
    for path in broken + whole[: max(0, len(whole) + len(kept) - limit)]:
        try:
            remove(path)
        except OSError as error:
            logger.warning("checkpoint %s could not be removed: %s", path, error)


def set_aside(directory: Path) -> None:
    """Make room for a checkpoint: remove the remains of an interrupted one, and keep a complete one
    of the same step under another name until `drop_aside` or `put_back`."""
    if not directory.exists():
        return
    if is_complete(directory):
        aside = _aside(directory)
        if aside.exists():
            remove(aside)
        directory.rename(aside)
        flush(directory.parent)
    else:
        remove(directory)


def drop_aside(directory: Path) -> None:
    """Remove what `set_aside` kept; call this when the new checkpoint is complete."""
    if _aside(directory).exists():
        remove(_aside(directory))


def put_back(directory: Path) -> None:
    """Remove a checkpoint that could not be written, and put back what `set_aside` kept."""
    if directory.exists():
        remove(directory)
    if _aside(directory).exists():
        _aside(directory).rename(directory)
        flush(directory.parent)


def recover(run_dir: Path) -> None:
    """Finish what a killed run was about to do with a checkpoint it had set aside."""
    for aside in run_dir.glob(f".{PREFIX}*{ASIDE}"):
        directory = run_dir / aside.name.removeprefix(".").removesuffix(ASIDE)
        (drop_aside if is_complete(directory) else put_back)(directory)


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}{ASIDE}")


class CheckpointWriteError(OSError):
    """A checkpoint could not be written. Its remains are removed, earlier ones are untouched, and
    the trainer's model is as it was."""


def write_error(directory: Path, cause: Exception) -> CheckpointWriteError:
    """Return the error to raise for a checkpoint that could not be written, before `put_back`."""
    usage = shutil.disk_usage(directory.parent)
    last = next(
        (path for path in reversed(checkpoints(directory.parent)) if is_complete(path)), None
    )
    last_one = "there is no complete checkpoint"
    if last is not None:
        last_one = f"the last complete one is {last} ({_size(last)} bytes)"
    return CheckpointWriteError(
        f"{directory} could not be written: {cause}. {_size(directory)} bytes of it were there, "
        f"{usage.free} of {usage.total} bytes are free on its disk; {last_one}. Training stops; "
        "make room and resume with resume_from_checkpoint=True"
    )


def clear_frames(error: BaseException | None) -> None:
    """Free what the frames of an error and its causes hold: torch's writer keeps its file open, and
    with it the space of a file that is removed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
