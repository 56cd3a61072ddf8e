"""Files of Hugging Face chat rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["load_chat"]


def load_chat(path: str | Path, image_root: str | Path | None = None) -> list[dict[str, Any]]:
    """Chat rows of a JSON list or a JSON-lines file, in UTF-8.

    Args:
        path: the file.
        image_root: folder that relative image paths start from; defaults to the file's.

    Raises:
        FileNotFoundError: when the file is missing.
        ValueError: for a line that is no JSON object, naming it.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    root = source.parent if image_root is None else Path(image_root)
    return [_with_image_paths(row, root) for row in _records(source)]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    # Editors of some systems write a byte order mark.
    text = path.read_text(encoding="utf-8-sig")
    # Not splitlines: JSON allows further characters that it takes for line ends.
    lines = enumerate(text.split("\n"), start=1)
    if text.lstrip().startswith("["):
        numbered = list(enumerate(_parsed(text, f"{path}"), start=1))
    else:
        numbered = [(n, _parsed(line, f"{path}, line {n}")) for n, line in lines if line.strip()]
    for number, record in numbered:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {number}: expected an object, got {record!r:.60}")
        yield record


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _with_image_paths(row: dict[str, Any], root: Path) -> dict[str, Any]:
    """Anchor the row's image paths, whether in a column or inside message parts."""
    anchored = dict(row)
    for column in ("images", "image"):
        value = row.get(column)
        if isinstance(value, str):
            anchored[column] = str(root / value)
        elif isinstance(value, list):
            anchored[column] = [str(root / v) if isinstance(v, str) else v for v in value]
    for column in ("messages", "prompt"):
        if isinstance(row.get(column), list):
            anchored[column] = [_message_with_paths(message, root) for message in row[column]]
    return anchored


def _message_with_paths(message: Any, root: Path) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {**part, "image": str(root / part["image"])}
        if isinstance(part, dict) and isinstance(part.get("image"), str)
        else part
        for part in message["content"]
    ]
    return {**message, "content": parts}
