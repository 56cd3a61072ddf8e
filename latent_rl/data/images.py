"""Images from disk, decoded within bounds."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

__all__ = ["MAX_PIXELS", "load_image"]

MAX_PIXELS = 64 * 2**20


def load_image(source: Image.Image | str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image from a path or an image already in memory.

    The size in the file's header is checked before anything is decoded, so a small file cannot
    unpack into gigabytes.

    Raises:
        FileNotFoundError: when the file is missing.
        ValueError: when it is no image, is damaged, or has more than ``max_pixels`` pixels.
    """
    if isinstance(source, Image.Image):
        _check_size(source, "image", max_pixels)
        return source.convert("RGB")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"image: no such file: {path}")
    try:
        with Image.open(path) as image:
            _check_size(image, str(path), max_pixels)
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"image: {path} cannot be decoded: {error}") from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"image: {name} has {width} x {height} pixels, more than the {max_pixels} allowed"
        )
