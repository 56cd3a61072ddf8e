"""Checkpoints: safetensors of the latent modules and a JSON file that names the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latent_rl.models.config import LatentConfig

if TYPE_CHECKING:
    from latent_rl.models.latent_action_model import LatentActionModel

WEIGHTS_NAME = "latent_model.safetensors"
CONFIG_NAME = "latent_config.json"
BACKBONE_DIR = "backbone"
FORMAT_VERSION = 1
_PREFIX = "latent."


def save(
    model: LatentActionModel,
    directory: str | Path,
    *,
    include_backbone: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint; an interrupted call leaves the previous one or an error, never a mix.

    Every file is written aside, flushed to disk and renamed. The weights file carries its own
    settings and the digest of its tensors, so it is whole or refused; the JSON file beside it
    says the same to people and to tools, and must agree with it.

    Args:
        model: the model.
        directory: made when missing.
        include_backbone: write ``backbone/`` with ``save_pretrained`` too.
        state_dict: names as in ``model.state_dict()``; default: the model's own.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state_dict is None else state_dict
    tensors = {
        name.removeprefix(_PREFIX): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name.startswith(_PREFIX)
    }
    record = {
        "format_version": FORMAT_VERSION,
        "latent": dataclasses.asdict(model.latent_config),
        "base_model": _base_model(model.config, include_backbone),
    }
    text = json.dumps(record, indent=2) + "\n"
    if include_backbone:
        _save_backbone(model, target, state)
    with _aside(target / CONFIG_NAME) as config, _aside(target / WEIGHTS_NAME) as weights:
        config.write_text(text, encoding="utf-8")
        metadata = {"format": "pt", "record": text, "sha256": _digest(tensors)}
        save_file(tensors, weights, metadata=metadata)


def _base_model(config: Any, included: bool) -> dict[str, Any]:
    text = config.get_text_config()
    return {
        "name": BACKBONE_DIR if included else str(getattr(config, "_name_or_path", "") or ""),
        "included": included,
        "model_type": str(config.model_type),
        "hidden_size": int(text.hidden_size),
        "num_hidden_layers": int(text.num_hidden_layers),
    }


def _save_backbone(model: LatentActionModel, target: Path, state: Mapping[str, Tensor]) -> None:
    aside = target / f".{BACKBONE_DIR}.{os.getpid()}.tmp"
    _remove_tree(aside)
    weights = {
        name.removeprefix("backbone."): tensor
        for name, tensor in state.items()
        if name.startswith("backbone.")
    }
    try:
        cast(Any, model.backbone).save_pretrained(aside, state_dict=weights)
        for path in aside.rglob("*"):
            if path.is_file():
                _flush(path)
        final, old = target / BACKBONE_DIR, target / f".{BACKBONE_DIR}.{os.getpid()}.old"
        if final.exists():
            final.rename(old)
        aside.rename(final)
        _remove_tree(old)
    finally:
        _remove_tree(aside)


def _remove_tree(path: Path) -> None:
    if not path.exists():
        return
    for child in path.iterdir():
        if child.is_dir():
            _remove_tree(child)
        else:
            child.unlink()
    path.rmdir()


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to ``path`` when the block succeeds and removed when not."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        flat = tensors[name].contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_config(directory: str | Path) -> tuple[LatentConfig, dict[str, Any]]:
    """The settings and the whole record of a checkpoint, checked, without its weights.

    Raises:
        FileNotFoundError: when the JSON file is missing.
        ValueError: when it cannot be read or is of another format version.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, latent = record["format_version"], record["latent"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: {path} is corrupt ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"checkpoint: {path} has format version {version}, this library reads {FORMAT_VERSION}"
        )
    return LatentConfig.from_mapping(latent), record


def load(
    cls: type[LatentActionModel],
    directory: str | Path,
    backbone: nn.Module | None,
    backbone_options: Mapping[str, Any] | None = None,
) -> LatentActionModel:
    """See ``LatentActionModel.from_pretrained``."""
    source = Path(directory)
    config, record = read_config(source)
    tensors = _read_weights(source / WEIGHTS_NAME, config)
    if backbone is None:
        backbone = _load_backbone(source, record, backbone_options or {})
    elif backbone_options:
        raise ValueError("from_pretrained: backbone_options are for loading a backbone, got both")
    _check_base(cast(Any, backbone).config, record, source)
    model = cls(backbone, config)
    install_weights(model, tensors, str(source / WEIGHTS_NAME))
    return model


def load_into(model: LatentActionModel, directory: str | Path) -> None:
    """Load a checkpoint's latent weights into a model that exists (resuming a run).

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when the files are corrupt or do not fit the model, which is then unchanged.
    """
    source = Path(directory)
    config, record = read_config(source)
    if config.num_codes != model.latent_config.num_codes:
        raise ValueError(
            f"checkpoint: {source} has num_codes {config.num_codes}, "
            f"the model has {model.latent_config.num_codes}"
        )
    _check_base(model.config, record, source)
    tensors = _read_weights(source / WEIGHTS_NAME, config)
    install_weights(model, tensors, str(source / WEIGHTS_NAME))


def _read_weights(path: Path, config: LatentConfig) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {path} is corrupt ({error})") from error
    if metadata.get("sha256") != _digest(tensors):
        raise ValueError(f"checkpoint: {path} is corrupt (its tensors differ from their digest)")
    saved = json.loads(metadata["record"])["latent"]
    for name, value in dataclasses.asdict(config).items():
        if saved.get(name, value) != value:
            raise ValueError(
                f"checkpoint: {path.with_name(CONFIG_NAME)} has {name} {value!r}, "
                f"but the weights beside it were saved with {saved[name]!r}"
            )
    return tensors


def install_weights(model: LatentActionModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into ``model.latent`` after checking every name and shape.

    Raises:
        ValueError: naming the first differences; the model is unchanged.
    """
    own = model.latent.state_dict()
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or extra:
        raise ValueError(
            f"checkpoint: {source} does not fit the model: {len(missing)} missing "
            f"{missing[:3]}, {len(extra)} unexpected {extra[:3]}"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"checkpoint: {source}: {name} must be {list(tensor.shape)}, "
                f"got {list(tensors[name].shape)}"
            )
    model.latent.load_state_dict(dict(tensors))


def _check_base(config: Any, record: Mapping[str, Any], source: Path) -> None:
    saved, own = record.get("base_model") or {}, _base_model(config, False)
    for name in ("model_type", "hidden_size", "num_hidden_layers"):
        if name in saved and saved[name] != own[name]:
            raise ValueError(
                f"checkpoint: {source} was made for a backbone with {name} {saved[name]!r}, "
                f"got {own[name]!r}"
            )


def _load_backbone(
    source: Path, record: Mapping[str, Any], options: Mapping[str, Any]
) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    base = record.get("base_model") or {}
    name = str(source / BACKBONE_DIR) if base.get("included") else base.get("name")
    if not name:
        raise ValueError(
            f"checkpoint: {source} names no base model; give from_pretrained a backbone"
        )
    if options.get("trust_remote_code"):
        raise ValueError("from_pretrained: trust_remote_code is never allowed, got True")
    loaded = AutoModelForImageTextToText.from_pretrained(name, **{"dtype": "auto", **options})
    return cast(nn.Module, loaded)
