"""The pictures: scikit-learn's 1,797 scans of handwritten digits, as PNG files."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latent_rl.demo.world import DIGITS
from latent_rl.eval.writing import write_json

__all__ = ["SCAN_PIXELS", "Scans", "digit_of", "read_scans", "write_scans"]

SCAN_PIXELS = 16
_LABELS = "labels.json"


@dataclass(frozen=True)
class Scans:
    """Paths and digits of scans, in training and held-out parts.

    Attributes:
        train: (file name relative to the data directory, digit) pairs.
        test: the same for scans that no training of the demo sees.
    """

    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def write_scans(directory: Path, *, seed: int, held_out: int = 360) -> Scans:
    """Write every scan as a 16 x 16 RGB PNG under ``directory/scans`` and split them at random."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = directory / "scans"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        # Grey levels are 0..16; the image processor wants RGB and at least 16 pixels.
        grey = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        name = f"scans/{index:04d}.png"
        grey.resize((SCAN_PIXELS, SCAN_PIXELS)).convert("RGB").save(directory / name)
        found.append((name, int(digit)))
    random.Random(seed).shuffle(found)
    split = {"test": found[:held_out], "train": found[held_out:]}
    write_json(directory / _LABELS, split)
    return Scans(tuple(split["train"]), tuple(split["test"]))


def read_scans(directory: Path) -> Scans:
    """What :func:`write_scans` wrote."""
    split = json.loads((directory / _LABELS).read_text(encoding="utf-8"))
    return Scans(
        tuple((str(name), int(digit)) for name, digit in split["train"]),
        tuple((str(name), int(digit)) for name, digit in split["test"]),
    )


def digit_of(scans: Scans) -> dict[str, str]:
    """File name without folders -> name of its digit."""
    return {Path(name).name: DIGITS[digit] for name, digit in scans.train + scans.test}
