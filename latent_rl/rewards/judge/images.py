"""Images for a judge: few, small, as data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latent_rl.data import load_image
from latent_rl.rewards.judge.settings import JudgeSettings

__all__ = ["ImageEncoder", "images_of"]

_QUALITIES = (85, 70, 50)


def images_of(row: Mapping[str, Any], prompt: Any) -> list[Any]:
    """The images of a row: its `images` or `image` column, else those inside the messages."""
    if row.get("images") is not None:
        return list(row["images"])
    if row.get("image") is not None:
        return [row["image"]]
    if isinstance(prompt, str):
        return []
    parts = [
        part for turn in prompt if isinstance(turn.get("content"), list) for part in turn["content"]
    ]
    return [
        part["image"]
        for part in parts
        if part.get("type") == "image" and part.get("image") is not None
    ]


class ImageEncoder:
    """Encodes images as bounded data URLs, each image object of a batch once."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        # The image is kept with its URL: an id alone could be reused by another object.
        self._done: dict[int, tuple[Any, str]] = {}

    def urls(self, images: Sequence[Any]) -> tuple[str, ...]:
        """Data URLs of the first images.

        Raises:
            ValueError, FileNotFoundError: an image that cannot be read.
        """
        if not self.settings.send_images:
            return ()
        return tuple(self._url(image) for image in images[: self.settings.max_images])

    def _url(self, image: Any) -> str:
        if id(image) not in self._done:
            self._done[id(image)] = (image, self._encoded(image))
        return self._done[id(image)][1]

    def _encoded(self, source: Image.Image | str | Path) -> str:
        limit = self.settings.max_image_pixels
        image = load_image(source)
        while True:
            width, height = image.size
            if width * height > limit:
                scale = (limit / (width * height)) ** 0.5
                image = image.resize(
                    (max(1, int(width * scale)), max(1, int(height * scale))),
                    Image.Resampling.LANCZOS,
                )
            for quality in _QUALITIES:
                buffer = io.BytesIO()
                image.save(buffer, format="JPEG", quality=quality)
                data = buffer.getvalue()
                if len(data) <= self.settings.max_image_bytes or image.size == (1, 1):
                    return f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"
            limit = max(1, image.size[0] * image.size[1] // 2)
