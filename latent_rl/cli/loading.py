"""Loading models and processors by name, with errors that name the cause."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_rl.cli.errors import UserError

if TYPE_CHECKING:
    import torch

    from latent_rl.models import LatentActionModel, LatentConfig

__all__ = [
    "check_agreement",
    "load_backbone",
    "load_checkpoint",
    "load_processor",
    "no_bars_in_logs",
    "require_model_name",
    "saved_latent_config",
    "torch_device",
]

_CONFIG = "config.json"
_DEMO_PROCESSOR = "ImageTextProcessor"
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def no_bars_in_logs() -> None:
    """Switch transformers' own progress bars off where nobody watches them move."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def require_model_name(name: str, where: str) -> None:
    """Check that a local directory holds a model; a hub name cannot be checked without loading.

    Raises:
        UserError: for a path that is no model directory.
    """
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if looks_local and not (path / _CONFIG).is_file():
        reason = f"has no {_CONFIG}" if path.is_dir() else "no such directory"
        raise UserError(f"{where}: {name}: {reason}")


def load_backbone(name: str, dtype: str, where: str) -> Any:
    """An image-text model by name or directory, never with code of its own.

    Raises:
        UserError: when it cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText

    require_model_name(name, where)
    try:
        return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{where}: cannot load {name}: {error}") from error


def load_processor(candidates: list[str | Path], where: str) -> Any:
    """The first processor found among names and directories.

    Raises:
        UserError: when none has one, or it cannot be loaded.
    """
    for candidate in candidates:
        if os.path.isdir(candidate) and not _has_processor(Path(candidate)):  # noqa: PTH112
            continue
        try:
            processor = _processor_class(candidate).from_pretrained(candidate)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{where}: cannot load {candidate}: {error}") from error
        if getattr(processor, "tokenizer", None) is None:
            raise UserError(
                f"{where}: {candidate} gave a tokenizer, not a processor of images; processors "
                "with a video part need torchvision"
            )
        return processor
    tried = ", ".join(str(candidate) for candidate in candidates) or "nothing"
    raise UserError(f"{where}: no processor found (looked in {tried})")


def _processor_class(candidate: str | Path) -> Any:
    """The class that loads a processor; the demo's own is none of transformers'."""
    from transformers import AutoProcessor

    record = Path(candidate) / "processor_config.json"
    saved = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if saved.get("processor_class") == _DEMO_PROCESSOR:
        from latent_rl.demo.tiny_vlm import ImageTextProcessor

        return ImageTextProcessor
    return AutoProcessor


def _has_processor(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _PROCESSOR_FILES)


def saved_latent_config(directory: Path) -> tuple[LatentConfig, dict[str, Any]]:
    """Settings and record of a latent-action checkpoint, without its weights."""
    from latent_rl.models.checkpoint import read_config

    return read_config(directory)


def check_agreement(asked: dict[str, Any], saved: LatentConfig, where: str) -> None:
    """Check that what a recipe says of the latent modules is what a checkpoint holds.

    Raises:
        UserError: naming the first field that differs (K, for example).
    """
    for name, value in asked.items():
        held = getattr(saved, name)
        if value != held:
            raise UserError(f"{where}: {name} is {value!r}, but the checkpoint has {held!r}")


def load_checkpoint(directory: Path, backbone: str | None, dtype: str) -> LatentActionModel:
    """A latent-action model, on the base model its checkpoint names or on another.

    Raises:
        UserError: when the base model cannot be loaded.
        FileNotFoundError, ValueError: when a file is missing, corrupt or does not fit.
    """
    from latent_rl.models import LatentActionModel

    _, record = saved_latent_config(directory)
    base = record.get("base_model") or {}
    if backbone is None:
        backbone = str(directory / base["name"]) if base.get("included") else base.get("name")
    if not backbone:
        raise UserError(f"{directory}: names no base model; give --backbone")
    where = f"base model of {directory}"
    return LatentActionModel.from_pretrained(directory, load_backbone(backbone, dtype, where))


def torch_device(name: str | None) -> torch.device:
    """A device by name; None takes CUDA where there is one.

    Raises:
        UserError: when there is no such device.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: {name!r} is no torch device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: no CUDA device is available")
    return device
