"""Bounded decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from latent_rl.data import load_image


def test_reads_rgb(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.png")
    image = load_image(tmp_path / "grey.png")
    assert image.mode == "RGB"
    assert image.size == (5, 4)
    assert image.getpixel((0, 0)) == (7, 7, 7)


def test_refuses_more_pixels_than_allowed_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "big.png")

    def decode(*args: object) -> None:
        raise AssertionError("decoded an image beyond the bound")

    monkeypatch.setattr(Image.Image, "convert", decode)
    with pytest.raises(ValueError, match=r"20 x 20 pixels, more than the 399 allowed"):
        load_image(tmp_path / "big.png", max_pixels=399)


def test_refuses_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.png cannot be decoded"):
        load_image(tmp_path / "text.png")


def test_refuses_a_truncated_image(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"cut\.png cannot be decoded"):
        load_image(path)


def test_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        load_image(tmp_path / "no.png")
