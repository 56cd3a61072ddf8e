"""The data sets of a recipe: read and checked in full before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latent_rl.cli.errors import UserError
from latent_rl.config import DataRecipe, closest
from latent_rl.data import (
    conversation_of,
    load_chat,
    load_mmrole,
    load_paper_json,
    load_pcogalign,
    prompt_of,
)

__all__ = ["FORMATS", "conversations", "prompts"]

Rows = list[dict[str, Any]]
Loader = Callable[[Path, Path | None], Rows]


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
