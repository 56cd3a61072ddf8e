"""The data sets of a recipe: read and checked in full before anything heavy is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from latent_rl.cli.errors import UserError
from latent_rl.config import DataRecipe, closest
from latent_rl.data import (
    conversation_of,
    load_mmrole,
    load_paper_json,
    load_pcogalign,
    prompt_of,
)

__all__ = ["FORMATS", "conversations", "load_chat", "prompts"]

Rows = list[dict[str, Any]]
Loader = Callable[[Path, Path | None], Rows]


def load_chat(path: Path, image_root: Path | None = None) -> Rows:
    """Rows of a JSON list or a JSON-lines file; relative image paths start from `image_root`
    (default: the file's directory).

    Raises:
        FileNotFoundError: when the file is missing.
        ValueError: for a line that is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    root = path.parent if image_root is None else image_root
    return [_with_image_paths(row, root) for row in _records(path)]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    lines = enumerate(text.splitlines(), start=1)
    try:
        if text.lstrip().startswith("["):
            numbered = list(enumerate(json.loads(text), start=1))
        else:
            numbered = [(number, json.loads(line)) for number, line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    for number, record in numbered:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {number}: expected an object, got {record!r:.60}")
        yield record


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


def _paper(path: Path, image_root: Path | None) -> Rows:
    return load_paper_json(path, image_root)


def _mmrole(path: Path, image_root: Path | None) -> Rows:
    return load_mmrole(path, image_root)


def _mmrole_prompts(path: Path, image_root: Path | None) -> Rows:
    return load_mmrole(path, image_root, prompts=True)


def _pcogalign(path: Path, image_root: Path | None) -> Rows:
    return load_pcogalign(path, image_root)


def _pcogalign_prompts(path: Path, image_root: Path | None) -> Rows:
    return load_pcogalign(path, image_root, prompts=True)


# Format -> (reader of conversations, reader of prompts).
FORMATS: Mapping[str, tuple[Loader, Loader]] = {
    "chat": (load_chat, load_chat),
    "paper": (_paper, _paper),
    "mmrole": (_mmrole, _mmrole_prompts),
    "pcogalign": (_pcogalign, _pcogalign_prompts),
}


def conversations(name: str, recipe: DataRecipe) -> Rows:
    """Checked conversation rows of one data set.

    Raises:
        UserError: naming the data set and the cause.
    """
    return _load(name, recipe, 0, conversation_of)


def prompts(name: str, recipe: DataRecipe) -> Rows:
    """Checked RL rows of one data set.

    Raises:
        UserError: naming the data set and the cause.
    """
    return _load(name, recipe, 1, prompt_of)


def _load(
    name: str,
    recipe: DataRecipe,
    reader: int,
    normalise: Callable[[Mapping[str, Any], str], tuple[list[Any], list[Any]]],
) -> Rows:
    if recipe.format not in FORMATS:
        raise UserError(
            f"data.{name}: unknown format {recipe.format!r}{closest(recipe.format, FORMATS)}"
        )
    try:
        rows = FORMATS[recipe.format][reader](recipe.path, recipe.image_root)[: recipe.limit]
        for index, row in enumerate(rows):
            where = f"{recipe.path}, row {index}"
            for image in normalise(row, where)[1]:
                if isinstance(image, (str, Path)) and not Path(image).is_file():
                    raise UserError(f"{where}: image is missing: {image}")
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"data.{name}: {error}") from error
    if not rows:
        raise UserError(f"data.{name}: {recipe.path} has no rows of format {recipe.format}")
    return rows
