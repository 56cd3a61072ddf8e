"""What of a row an evaluation keeps: its text, its fingerprint and small pictures."""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from latent_rl.data import load_image, prompt_of
from latent_rl.eval.answering import Row
from latent_rl.rewards import RewardFunction

__all__ = ["prompt_text", "reward_fingerprint", "row_fingerprint", "thumbnail"]

_SMALL, _LARGE = 96, 192


def prompt_text(row: Row) -> str:
    """The text of all turns, a line per turn, without image parts."""
    messages, _ = prompt_of(row)
    return "\n".join(
        f"{message['role']}: " + "".join(part.get("text") or "" for part in message["content"])
        for message in messages
    )


def row_fingerprint(row: Row) -> str:
    """A digest of everything that decides answers and rewards: prompt, pixels, other columns.

    Paths do not enter it, so a data set that moved is still the same. Columns that JSON cannot
    hold are left out.
    """
    messages, images = prompt_of(row)
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True, default=str).encode())
    for image in images:
        pixels = load_image(image)
        digest.update(repr(pixels.size).encode() + pixels.tobytes())
    for name in sorted(set(row) - {"prompt", "images", "image"}):
        try:
            text = json.dumps(row[name], sort_keys=True)
        except TypeError:
            continue
        digest.update(f"\n{name}={text}".encode())
    return digest.hexdigest()[:16]


def reward_fingerprint(
    function: RewardFunction, name: str, settings: Mapping[str, Any] | None
) -> str:
    """A digest of a reward's name, code and settings; the settings themselves are not kept, since
    they may hold secrets."""
    described = function if inspect.isroutine(function) else type(function)
    try:
        source = inspect.getsource(described)
    except (OSError, TypeError):
        source = ""  # Built in, or typed at a prompt.
    text = json.dumps([name, source, settings], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def thumbnail(image: Any) -> str:
    """An image as a data URI: small ones enlarged without smoothing, large ones reduced."""
    picture = load_image(image)
    longest = max(picture.size)
    if longest <= _SMALL:
        scale = max(1, _SMALL // longest)
        size = (picture.width * scale, picture.height * scale)
        picture, kind = picture.resize(size, Image.Resampling.NEAREST), "png"
    else:
        picture.thumbnail((_LARGE, _LARGE))
        kind = "jpeg"
    out = io.BytesIO()
    picture.save(out, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
