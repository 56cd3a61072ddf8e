"""Tile sizes of the Triton search, by element, architecture and shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

__all__ = [
    "ARCHITECTURES",
    "MOST_REGISTERS",
    "RERANK",
    "RERANK_MANY",
    "Config",
    "Machine",
    "Prepare",
    "Rerank",
    "choose",
    "choose_prepare",
    "choose_rerank",
    "machine_of",
    "rerank_block_d",
    "screens",
    "splits_of",
]


@dataclass(frozen=True)
class Config:
    """Tiles of the screen: rows, codes and width, with warps and pipeline stages.

    Widths up to ``block_d`` stay on the chip; wider rows are streamed past every tile of codes.
    """

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Machine:
    """Compute capability, as 90, and number of multiprocessors."""

    architecture: int
    processors: int


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """What a device is. The interpreter pretends to a small one, so that tests see splits."""
    if device.type != "cuda":
        return Machine(90, 4)
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.major * 10 + properties.minor, properties.multi_processor_count)


@dataclass(frozen=True)
class Rerank:
    """Tiles of the second search, and how many programs share it out."""

    block_n: int
    block_k: int
    num_warps: int
    programs: int

    def exact_d(self, element_bytes: int) -> int:
        """Columns of float64 at a time: as many numbers a thread as registers hold."""
        numbers = 16 if element_bytes == 2 and self.block_n <= 16 else 8
        return numbers * 32 * self.num_warps // self.block_n


# The second search of few rows is bound by latency: small tiles, on many multiprocessors. That of
# many reads the codebook once per tile of rows, from the second-level cache.
RERANK = Rerank(block_n=16, block_k=32, num_warps=4, programs=264)
RERANK_MANY = Rerank(block_n=64, block_k=64, num_warps=8, programs=264)
# Of the preparation and the second search: left alone, ptxas takes fewer and spills.
MOST_REGISTERS = 255
# Columns a step of its product takes: as many as the screen's, within these.
RERANK_BLOCK_D = (64, 128)

# The small kernels around the screen; none is worth a table.
MEAN_SAMPLE, MEAN_BLOCK_D = 256, 32
PREPARE_WIDEST = 2048
MERGE_BLOCK_N = 128
DISTANCE_BLOCK_N, DISTANCE_BLOCK_D = 16, 128

# Per architecture and bytes of an element: (widest D served, fewest N served, configuration), the
# first that fits. Narrow rows stay resident; few rows want small tiles so that every
# multiprocessor has one: 8192 rows in tiles of 64 are 128 programs.
_Row = tuple[int, int, Config]
_ANY = 1 << 62
_MANY = 32768
_TABLE: dict[tuple[int, int], tuple[_Row, ...]] = {
    (80, 2): (
        (64, _MANY, Config(128, 128, 64, 8, 3)),
        (64, 0, Config(64, 128, 64, 4, 3)),
        (_ANY, _MANY, Config(128, 128, 32, 8, 4)),
        (_ANY, 0, Config(64, 128, 64, 8, 3)),
    ),
    (80, 4): (
        (_ANY, _MANY, Config(128, 64, 32, 8, 3)),
        (_ANY, 0, Config(64, 128, 32, 8, 3)),
    ),
    (90, 2): (
        (64, _MANY, Config(128, 128, 64, 8, 3)),
        (64, 0, Config(64, 128, 64, 4, 3)),
        (256, _MANY, Config(128, 128, 256, 8, 2)),
        (_ANY, _MANY, Config(128, 128, 64, 8, 4)),
        (_ANY, 0, Config(64, 128, 128, 8, 3)),
    ),
    (90, 4): (
        (64, _MANY, Config(128, 128, 64, 8, 3)),
        (64, 0, Config(64, 128, 64, 4, 3)),
        (_ANY, _MANY, Config(128, 128, 32, 8, 4)),
        (_ANY, 0, Config(64, 128, 64, 8, 3)),
    ),
}
_TABLE[100, 2] = (
    *_TABLE[90, 2][:3],
    # Accumulators pass from tensor memory through registers: wider tiles spill.
    (_ANY, _MANY, Config(128, 64, 64, 8, 4)),
    _TABLE[90, 2][4],
)
_TABLE[100, 4] = _TABLE[90, 4]
ARCHITECTURES = (80, 90, 100)


def screens(architecture: int, element_bytes: int) -> tuple[_Row, ...]:
    """Every row of the table for an architecture of ARCHITECTURES and an element size."""
    return _TABLE[architecture, element_bytes]


def choose(architecture: int, dtype: torch.dtype, n: int, width: int) -> Config:
    """Configuration for N rows of a width; the result of a search does not depend on it."""
    known = max((a for a in ARCHITECTURES if a <= architecture), default=ARCHITECTURES[0])
    rows = screens(known, dtype.itemsize)
    config = next(c for widest, fewest, c in rows if width <= widest and n >= fewest)
    narrow = max(16, 1 << (width - 1).bit_length())
    return replace(config, block_d=min(config.block_d, narrow))


def choose_rerank(n: int) -> Rerank:
    """Tiles of the second search of what a screen of N rows leaves."""
    return RERANK if n < _MANY else RERANK_MANY


def rerank_block_d(config: Config, width: int) -> int:
    """Columns of a step of the second search's product."""
    least, most = RERANK_BLOCK_D
    return min(max(config.block_d, least), most, max(16, 1 << (width - 1).bit_length()))


@dataclass(frozen=True)
class Prepare:
    """Codes and columns of one program of the preparation; the columns are one step where they
    can be, since every step waits for memory."""

    block_k: int
    block_d: int
    num_warps: int = 4


def choose_prepare(width: int) -> Prepare:
    """Tiles of eight to sixteen numbers a thread, of each of which three sums are kept."""
    block_d = min(max(16, 1 << (width - 1).bit_length()), PREPARE_WIDEST)
    return Prepare(max(1, 1024 // block_d), block_d)


def splits_of(config: Config, groups: int, n: int, num_codes: int, processors: int) -> int:
    """Programs that share the codebook of one tile of rows: a power of two that fills the device.

    Only where tiles of rows are too few, and never finer than a tile of codes.
    """
    programs = groups * -(-n // config.block_n)
    tiles = -(-num_codes // config.block_k)
    splits = 1
    while splits * 2 * programs <= processors and splits * 2 <= tiles:
        splits *= 2
    return splits
