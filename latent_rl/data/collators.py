"""Collators: rows to padded batches, with response labels and aligned views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_rl.data.render import (
    IGNORE_INDEX,
    Encoded,
    encode_conversation,
    encode_prompt,
)
from latent_rl.data.rows import Row, conversation_of

__all__ = ["ConversationCollator", "PairedViewCollator", "check_processor", "render_prompts"]


class ConversationCollator:
    """Rows ``{"messages", "images"}`` to ``{"inputs": ..., "labels": [B, L]}``, padded right.

    Rows with one image, several and none mix freely. Labels are -100 outside response tokens.
    """

    def __init__(self, processor: Any, *, max_length: int | None = None) -> None:
        """``max_length`` cuts long rows at the end; a row whose image tokens would be cut raises.

        Raises:
            TypeError, ValueError: for a processor that cannot serve, see :func:`check_processor`.
        """
        check_processor(processor)
        self.processor = processor
        self.max_length = max_length

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Encode and pad; ValueError names the row that cannot be."""
        return self.pad(self.encode(rows))

    def pad(self, encoded: Sequence[Encoded]) -> dict[str, Any]:
        """The batch of rows that were encoded before, for epochs that need no second encoding."""
        return _batch(self.processor, list(encoded))

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """The rows as token ids, cut to ``max_length``."""
        encoded = [
            encode_conversation(self.processor, row, f"row {i}") for i, row in enumerate(rows)
        ]
        return [self._cut(row, f"row {i}") for i, row in enumerate(encoded)]

    def _cut(self, row: Encoded, where: str) -> Encoded:
        if self.max_length is None or len(row.input_ids) <= self.max_length:
            return row
        placeholders = _image_ids(self.processor)
        if placeholders & set(row.input_ids[self.max_length :]):
            raise ValueError(f"{where}: max_length {self.max_length} would cut image tokens")
        end = self.max_length
        types = {name: values[:end] for name, values in row.token_types.items()}
        return Encoded(row.input_ids[:end], row.labels[:end], types, row.images)


class PairedViewCollator(ConversationCollator):
    """As :class:`ConversationCollator`, with the rows that have images rendered without them too.

    Adds ``"text_view": {"inputs", "rows" [P], "image_positions" [P, M], "text_positions" [P, M],
    "keep_mask" [P, M]}``: positions of the same text token in both renderings. The text view has no
    image placeholder; a batch without images has P = 0.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Encode, pad and align."""
        encoded = self.encode(rows)
        batch = self.pad(encoded)
        paired = [i for i, row in enumerate(encoded) if row.images]
        views = [
            self._cut(encode_conversation(self.processor, _without_images(rows[i])), f"row {i}")
            for i in paired
        ]
        pairs = [_align(encoded[i], view) for i, view in zip(paired, views, strict=True)]
        width = max((len(pair) for pair in pairs), default=0)
        positions = torch.zeros(len(pairs), 2, width, dtype=torch.int64)
        keep_mask = torch.zeros(len(pairs), width, dtype=torch.bool)
        for index, pair in enumerate(pairs):
            positions[index, :, : len(pair)] = torch.tensor(pair).T.reshape(2, -1)
            keep_mask[index, : len(pair)] = True
        batch["text_view"] = {
            "inputs": _batch(self.processor, views)["inputs"] if views else {},
            "rows": torch.tensor(paired, dtype=torch.int64),
            "image_positions": positions[:, 0],
            "text_positions": positions[:, 1],
            "keep_mask": keep_mask,
        }
        return batch


def render_prompts(
    processor: Any, rows: Sequence[Row], *, template_options: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Left-padded model inputs of RL rows, ready for ``generate``.

    A row that stands there several times (the same object) is encoded once.

    template_options: further arguments of the chat template; a row's ``chat_template_kwargs`` come
    on top.

    Raises:
        TypeError, ValueError: for a processor that cannot serve, see :func:`check_processor`.
        ValueError: naming the row that cannot be rendered.
    """
    check_processor(processor)
    known: dict[int, Encoded] = {}
    for i, row in enumerate(rows):
        if id(row) not in known:
            known[id(row)] = encode_prompt(processor, row, f"row {i}", template_options)
    encoded = [known[id(row)] for row in rows]
    inputs: dict[str, Tensor] = _batch(processor, encoded, left=True)["inputs"]
    return inputs


def check_processor(processor: Any) -> None:
    """Check that a processor reads images and chats.

    Raises:
        TypeError: for a tokenizer, or anything else without one inside.
        ValueError: without a chat template or a pad token.
    """
    if getattr(processor, "tokenizer", None) is None:
        raise TypeError(
            "processor: expected the model's processor of text and images "
            f"(AutoProcessor.from_pretrained), got {type(processor).__name__}; AutoProcessor gives "
            "a tokenizer where the other parts cannot be loaded, as without torchvision"
        )
    if getattr(processor, "chat_template", None) is None:
        raise ValueError("processor: needs a chat template")
    if processor.tokenizer.pad_token_id is None:
        raise ValueError("processor: its tokenizer needs a pad token")


def _image_ids(processor: Any) -> set[int]:
    names = ("image_token_id", "video_token_id")
    found = {getattr(processor, name, None) for name in names}
    return {value for value in found if isinstance(value, int)}


def _batch(processor: Any, rows: list[Encoded], *, left: bool = False) -> dict[str, Any]:
    length = max(len(row.input_ids) for row in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        out = torch.full((len(values), length), fill, dtype=torch.int64)
        for i, value in enumerate(values):
            start = length - len(value) if left else 0
            out[i, start : start + len(value)] = torch.tensor(value)
        return out

    inputs: dict[str, Tensor] = {
        "input_ids": padded([row.input_ids for row in rows], processor.tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(row.input_ids) for row in rows], 0),
    }
    for name in {name for row in rows for name in row.token_types}:
        values = [row.token_types.get(name, [0] * len(row.input_ids)) for row in rows]
        inputs[name] = padded(values, 0)
    inputs |= _join_images([row.images for row in rows if row.images])
    return {"inputs": inputs, "labels": padded([row.labels for row in rows], IGNORE_INDEX)}


def _join_images(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate over rows; a row axis with ragged image counts (Idefics3) is padded first."""
    joined = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        shapes = [value.shape[1:] for value in values]
        if len(set(shapes)) > 1:
            target = [max(sizes) for sizes in zip(*shapes, strict=True)]
            values = [_pad_to(value, target) for value in values]
        joined[name] = torch.cat(values)
    return joined


def _pad_to(value: Tensor, target: list[int]) -> Tensor:
    missing = [want - have for want, have in zip(target, value.shape[1:], strict=True)]
    return F.pad(value, [amount for gap in reversed(missing) for amount in (0, gap)])


def _without_images(row: Row) -> Mapping[str, Any]:
    messages, _ = conversation_of(row)
    return {
        "messages": [
            {**m, "content": [part for part in m["content"] if part["type"] != "image"]}
            for m in messages
        ]
    }


def _align(image_view: Encoded, text_view: Encoded) -> list[tuple[int, int]]:
    """Positions of the same text tokens in both views, by their longest common runs."""
    matcher = SequenceMatcher(None, image_view.input_ids, text_view.input_ids, autojunk=False)
    return [
        (block.a + step, block.b + step)
        for block in matcher.get_matching_blocks()
        for step in range(block.size)
    ]
