"""Files of a checkpoint: each written whole or not at all, and flushed to disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["flush", "naming", "read_tensors", "write_atomically", "write_json", "write_tensors"]


def flush(path: Path) -> None:
    """Force a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(what: Path | str) -> Iterator[None]:
    """Turn the errors of reading a file into a ValueError that names it.

    Raises:
        ValueError: for whatever torch, pickle, json and the file system say of a bad file.
    """
    try:
        yield
    except (OSError, EOFError, UnpicklingError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"cannot read checkpoint file {what}: {error!r}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), flush it to disk and rename it to `path`.

    The directory is flushed too: a rename that only memory knows is lost with the power.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(aside)
        flush(aside)
        aside.replace(path)
        flush(path.parent)
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
