"""What a benchmark is: one declarative entry per op, found by :func:`entries`.

An entry says which inputs to build, how to call the op and its peers, what the call moves and
computes, and which tests must be green before a speed-up may be believed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """One point to measure. ``sizes`` uses the project's symbols: N, D, K, H, I, B."""

    sizes: Mapping[str, int]
    note: str = ""

    def __getitem__(self, symbol: str) -> int:
        return self.sizes[symbol]

    def __str__(self) -> str:
        return " ".join(f"{symbol}={size}" for symbol, size in self.sizes.items())


@dataclass(frozen=True)
class Peer:
    """Something to compare with.

    ``make(inputs)`` returns the timed call; it may raise ``ImportError`` when the peer is not
    installed, which the report states in place of a number.
    """

    name: str
    make: Callable[[Inputs], Call]


@dataclass(frozen=True)
class Entry:
    """A benchmark of one op.

    ``bytes_moved`` counts each input read once and each output written once; ``flops`` the
    multiply-adds (two each) the definition needs.
    """

    op: str
    shapes: tuple[Shape, ...]
    make_inputs: Callable[[Shape, torch.device, torch.dtype], Inputs]
    ours: Callable[[Inputs], Call]
    peers: tuple[Peer, ...]
    bytes_moved: Callable[[Shape, torch.dtype], int]
    flops: Callable[[Shape], int]
    tests: str


def entries() -> dict[str, Entry]:
    """All entries under ``benchmarks/ops``, by op name."""
    package = importlib.import_module("benchmarks.ops")
    modules = (
        importlib.import_module(f"benchmarks.ops.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    )
    return {module.ENTRY.op: module.ENTRY for module in modules}
