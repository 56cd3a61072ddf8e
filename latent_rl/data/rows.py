"""Rows: what every adapter yields and every collator takes.

A conversation row is ``{"messages": [...], "images": [...]}`` with messages in the chat format of
transformers: ``{"role": str, "content": [{"type": "text", "text": str} | {"type": "image"}]}``.
An RL row has ``"prompt"`` in place of ``"messages"``, and any further columns its rewards need.
Image parts take the row's images in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

__all__ = ["Message", "Row", "conversation_of", "prompt_of"]

Message: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[str, Any]

_ROLES = ("system", "user", "assistant", "tool")


def conversation_of(row: Row, where: str = "row") -> tuple[list[Message], list[Any]]:
    """Normalised messages and images of a conversation row.

    String contents become text parts; an image that no part names goes before the first user
    turn's text, as TRL and the chat templates expect.

    Raises:
        ValueError: naming ``where``, for missing columns, unknown roles, or image parts and
            images that differ in number.
    """
    return _normalise(row, "messages", where)


def prompt_of(row: Row, where: str = "row") -> tuple[list[Message], list[Any]]:
    """As :func:`conversation_of` for an RL row's ``prompt``, a string or a list of messages."""
    if isinstance(row.get("prompt"), str):
        row = {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
    return _normalise(row, "prompt", where)


def _normalise(row: Row, column: str, where: str) -> tuple[list[Message], list[Any]]:
    given = row.get(column)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(
            f"{where}: column {column!r} must be a non-empty list of messages, "
            f"got {type(given).__name__}; columns are {sorted(row)}"
        )
    messages = [_message(message, f"{where}, {column}[{i}]") for i, message in enumerate(given)]
    images = _images(row, messages, where)
    parts = sum(part["type"] == "image" for m in messages for part in m["content"])
    if parts == 0 and images:
        _insert_images(messages, len(images), where)
    elif parts != len(images):
        raise ValueError(f"{where}: {parts} image parts in {column!r} but {len(images)} images")
    return messages, images


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise ValueError(f"{where}: expected a message with role and content, got {message!r:.80}")
    if message["role"] not in _ROLES:
        raise ValueError(f"{where}: role must be one of {_ROLES}, got {message['role']!r}")
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not (isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content)):
        raise ValueError(
            f"{where}: content must be text or a list of text and image parts, got {content!r:.80}"
        )
    parts = [dict(part) for part in content]
    for part in parts:
        # Datasets with a fixed schema fill the other kind's field with None.
        if part.get("type") not in ("text", "image"):
            raise ValueError(f"{where}: part type must be text or image, got {part.get('type')!r}")
        if part["type"] == "text":
            _check_text(part.get("text"), where)
    return {"role": message["role"], "content": parts}


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{where}: the text of a part must be text, got {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Half of a pair that JSON escapes can hold; no tokenizer takes it.
        raise ValueError(f"{where}: the text is no Unicode: {error}") from error


def _images(row: Row, messages: list[Message], where: str) -> list[Any]:
    images = row.get("images")
    if images is None:
        single = row.get("image")
        images = [] if single is None else [single]
    if isinstance(images, str) or not isinstance(images, Sequence):
        raise ValueError(
            f"{where}: column 'images' must be a list of images (one may stand in 'image'), "
            f"got {type(images).__name__}"
        )
    if any(image is None for image in images):
        raise ValueError(f"{where}: column 'images' holds None in the place of an image")
    inline = [
        part.pop("image")
        for message in messages
        for part in message["content"]
        if part["type"] == "image" and part.get("image") is not None
    ]
    return list(images) or inline


def _insert_images(messages: list[Message], count: int, where: str) -> None:
    first_user = next((m for m in messages if m["role"] == "user"), None)
    if first_user is None:
        raise ValueError(f"{where}: images need a user turn to stand in, roles have none")
    first_user["content"] = [{"type": "image"} for _ in range(count)] + first_user["content"]
