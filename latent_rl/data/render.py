"""From rows to token ids, one segment at a time.

A conversation is cut where the assistant begins and ends to speak, and every segment is tokenised
on its own. The response tokens are then exactly those that a rollout on the same prompt would have
to emit, and no tokenizer can merge across the border between prompt and response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_rl.data.images import load_image
from latent_rl.data.rows import Message, Row, conversation_of, prompt_of

__all__ = ["IGNORE_INDEX", "Encoded", "encode_conversation", "encode_prompt"]

IGNORE_INDEX = -100
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
_PER_TOKEN = ("input_ids", "attention_mask", *_TOKEN_TYPES)


@dataclass
class Encoded:
    """One row as token ids.

    Attributes:
        input_ids: L ids. labels: L ids, ``IGNORE_INDEX`` outside response tokens.
        token_types: per kind the processor gives, L values.
        images: the processor's image tensors, joined over the row's segments.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    token_types: dict[str, list[int]] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Segment:
    text: str
    images: tuple[Any, ...]
    is_response: bool


def encode_conversation(processor: Any, row: Row, where: str = "row") -> Encoded:
    """Encode a conversation row; every assistant turn is a response, up to its end token.

    Raises:
        ValueError: when the chat template does not write a conversation as the continuation of
            its beginning, or the row has no assistant turn.
    """
    messages, images = conversation_of(row, where)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: messages have no assistant turn to learn from")
    return _encode(processor, _segments(processor, messages, images, where), where)


def encode_prompt(
    processor: Any,
    row: Row,
    where: str = "row",
    template_options: Mapping[str, Any] | None = None,
) -> Encoded:
    """Encode an RL row's prompt, ending where the assistant begins to speak.

    template_options: further arguments of the chat template; the row's ``chat_template_kwargs``
    come on top.
    """
    messages, images = prompt_of(row, where)
    options = {**(template_options or {}), **(row.get("chat_template_kwargs") or {})}
    text = _template(processor, messages, generation_prompt=True, options=options)
    loaded = tuple(load_image(image) for image in images)
    return _encode(processor, [_Segment(text, loaded, False)], where)


def _template(
    processor: Any,
    messages: Sequence[Message],
    *,
    generation_prompt: bool,
    options: Mapping[str, Any] | None = None,
) -> str:
    text: str = processor.apply_chat_template(
        list(messages), add_generation_prompt=generation_prompt, tokenize=False, **(options or {})
    )
    return text


def _segments(
    processor: Any, messages: list[Message], images: list[Any], where: str
) -> list[_Segment]:
    segments: list[_Segment] = []
    done, used = "", 0
    pending: list[Any] = []
    for index, message in enumerate(messages):
        count = sum(part["type"] == "image" for part in message["content"])
        pending += [load_image(image) for image in images[used : used + count]]
        used += count
        if message["role"] != "assistant":
            continue
        before = _template(processor, messages[:index], generation_prompt=True)
        after = _template(processor, messages[: index + 1], generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError(
                f"{where}: the chat template rewrites earlier turns, so response tokens cannot be "
                "told from prompt tokens; use a template that only appends"
            )
        segments.append(_Segment(before[len(done) :], tuple(pending), False))
        segments.append(_Segment(after[len(before) :], (), True))
        pending, done = [], after
    return segments


def _encode(processor: Any, segments: list[_Segment], where: str) -> Encoded:
    encoded = Encoded()
    for segment in segments:
        kwargs = {"images": [list(segment.images)]} if segment.images else {}
        output = processor(text=[segment.text], add_special_tokens=False, **kwargs)
        ids = [int(i) for i in output["input_ids"][0]]
        encoded.input_ids += ids
        encoded.labels += _labels(processor, ids) if segment.is_response else _ignored(ids)
        for name in _TOKEN_TYPES:
            if name in output:
                values = [int(v) for v in output[name][0]]
                previous = len(encoded.input_ids) - len(ids)
                encoded.token_types.setdefault(name, [0] * previous).extend(values)
        for name in output:
            if name not in _PER_TOKEN and segment.images:
                _join(encoded.images, name, torch.as_tensor(np.asarray(output[name])))
    for name, values in encoded.token_types.items():
        values.extend([0] * (len(encoded.input_ids) - len(values)))
        if len(values) != len(encoded.input_ids):
            raise ValueError(f"{where}: the processor's {name} do not fit its input_ids")
    return encoded


def _ignored(ids: list[int]) -> list[int]:
    return [IGNORE_INDEX] * len(ids)


def _labels(processor: Any, ids: list[int]) -> list[int]:
    """Response labels through the end token; what the template writes after it is no response."""
    eos = processor.tokenizer.eos_token_id
    if eos not in ids:
        return list(ids)
    end = len(ids) - ids[::-1].index(eos)
    return ids[:end] + [IGNORE_INDEX] * (len(ids) - end)


def _join(images: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Append image tensors: along the image axis, which a leading row axis of 1 may precede."""
    if name not in images:
        images[name] = value
        return
    has_row_axis = value.ndim >= 4 and value.shape[0] == 1 and images[name].shape[0] == 1
    images[name] = torch.cat([images[name], value], dim=1 if has_row_axis else 0)
