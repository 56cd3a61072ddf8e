"""Completions of dataset rows, scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_rl.data import load_image
from latent_rl.rewards.protocol import RewardFunction, RewardTable, score_all

__all__ = ["score_rows"]

_IMAGES = frozenset({"images", "image"})
# What the protocol itself hands over under these names.
_RESERVED = frozenset({"prompt", "completion", "completion_ids", "completions", "prompts"})


def score_rows(
    functions: Sequence[RewardFunction],
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    weights: Sequence[float] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> RewardTable:
    """Score one completion per row, as every trainer and every evaluation here does.

    A completion is a list of one assistant message where the row's prompt is a list of messages,
    and plain text where it is text. Every other column of the rows goes to the functions under its
    name. Paths in `images` and `image` become PIL images, each row's once.

    Args:
        functions: of the reward protocol.
        rows: dataset rows with ``prompt``, all with the same columns.
        texts, completion_ids: the completions.
        weights: of the functions; None for 1 each.
        extra: further keyword arguments, the same for every row.

    Raises:
        ValueError: no function, lengths that do not match, or an image that cannot be read.
        FileNotFoundError: an image that is missing.
    """
    prompts = [row["prompt"] for row in rows]
    completions: list[Any] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    names = [name for name in rows[0] if name not in _RESERVED] if rows else []
    return score_all(
        functions,
        prompts=prompts,
        completions=completions,
        completion_ids=[list(ids) for ids in completion_ids],
        columns=_columns(rows, names),
        weights=weights,
        extra=extra,
    )


def _columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    columns = {name: [row[name] for row in rows] for name in names}
    for name in _IMAGES & columns.keys():
        # The completions of a prompt share its row, and must share its decoded images.
        decoded: dict[int, Any] = {}
        for row in rows:
            if id(row) not in decoded:
                decoded[id(row)] = _decoded(row[name])
        columns[name] = [decoded[id(row)] for row in rows]
    return columns


def _decoded(value: Any) -> Any:
    if isinstance(value, (str, Path)):
        return load_image(value)
    if isinstance(value, (list, tuple)):
        return [_decoded(item) for item in value]
    return value
