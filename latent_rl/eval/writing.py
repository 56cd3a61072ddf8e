"""Files written aside and renamed, so that an interruption leaves none half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["write_bytes", "write_json", "write_text"]


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; its directory is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As :func:`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, *, compact: bool = False) -> None:
    """As :func:`write_text`, with ``value`` as JSON, indented unless ``compact``.

    Raises:
        ValueError: for NaN or infinity, which JSON does not have.
    """
    indent, separators = (None, (",", ":")) if compact else (1, None)
    text = json.dumps(
        value, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False
    )
    write_text(path, text + "\n")
