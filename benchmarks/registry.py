"""What a benchmark is: one declarative entry per op, found by :func:`entries`.

An entry says which inputs to build, how to call the op and its peers, what the call moves and
computes, and which tests must be green before a speed-up may be believed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from benchmarks.packages import why_absent
from latent_rl import backends

Inputs = Mapping[str, Tensor]
Call = Callable[[], Any]

OURS = "latent_rl"
# The unit of a row: the product of the same contraction, in float32 on the CPU (whose targets are
# written in it) and in the row's dtype on a GPU.
UNITS = {"cpu": "GEMM32", "cuda": "GEMM"}


class Pass(Enum):
    """What of an op is timed."""

    FORWARD = "forward"
    TRAIN = "forward+backward"


Make = Callable[[Inputs, Pass], Call]


@dataclass(frozen=True)
class Goal:
    """A number to reach: ``against``'s time over ours, our microseconds, or ours over the floor.

    ``against`` may name a peer, the unit, or "every peer". The floor is the time that the row's
    bytes and operations take at the roofs measured in the same run.
    """

    at_least: float | None = None
    against: str = ""
    at_most_us: float | None = None
    at_most_floor: float | None = None

    def __str__(self) -> str:
        if self.at_most_floor is not None:
            return f"<= {self.at_most_floor:g}x floor"
        if self.at_most_us is not None:
            return f"<= {self.at_most_us:g} us"
        if self.against in UNITS.values():
            return f"<= {1 / (self.at_least or 1):.3g} {self.against}"
        return f">= {self.at_least:g}x {self.against}"


@dataclass(frozen=True)
class Shape:
    """One point to measure. ``sizes`` uses the project's symbols: N, D, K, H, I, B.

    ``dtypes`` says, per device type, which dtypes are measured by default; a device that is not
    named there does not run the shape.
    """

    sizes: Mapping[str, int]
    note: str = ""
    dtypes: Mapping[str, tuple[str, ...]] | None = None
    goals: Mapping[tuple[str, str, Pass], tuple[Goal, ...]] | None = None

    def __getitem__(self, symbol: str) -> int:
        return self.sizes[symbol]

    def __str__(self) -> str:
        return " ".join(f"{symbol}={size}" for symbol, size in self.sizes.items())

    @property
    def tag(self) -> str:
        """The sizes alone, as given on the command line: 8192x2048x128."""
        return "x".join(str(size) for size in self.sizes.values())

    def dtypes_on(self, device: str) -> tuple[str, ...]:
        both = {"cpu": ("float32",), "cuda": ("bfloat16",)}
        return (self.dtypes or both).get(device, ())

    def goals_for(self, device: str, dtype: str, which: Pass) -> tuple[Goal, ...]:
        return (self.goals or {}).get((device, dtype, which), ())


@dataclass(frozen=True)
class Peer:
    """Something to compare with.

    Attributes:
        name: as it stands in tables.
        make: builds the timed call from inputs; what it does beforehand is not timed.
        package: key of ``benchmarks.packages``; "" for what comes with this project.
        devices, dtypes, passes: what it can run; all by default.
        own_stream: whether it works outside torch's current stream (timed by the host's clock).
        own_launch: launches as it does in real use, and is never captured into a graph for timing.
        backend: the row of the dispatch table forced for the entry's op while it runs.
        note: what a reader must know to judge the comparison.
    """

    name: str
    make: Make
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    passes: tuple[Pass, ...] = tuple(Pass)
    own_stream: bool = False
    own_launch: bool = False
    backend: str = ""
    note: str = ""

    def why_not(self, device: str, dtype: str, which: Pass) -> str | None:
        """Why it cannot take part here, or None."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)} only"
        if which not in self.passes:
            return f"has no {which.value} pass"
        return why_absent(self.package)


@dataclass(frozen=True)
class Entry:
    """A benchmark of one op.

    Attributes:
        bytes_moved: each input read once and each output written once, of one pass.
        flops: the multiply-adds (two each) the definition needs, of one pass.
        unit: the call whose time is 1 in tables, see ``UNITS``, or None.
        truth: an exact result of the inputs, computed once per row, for ``check``.
        check: quality of a call's result as numbers, given the truth.
        hard: the same inputs made hard to get right, checked like the others but not timed.
        stats: numbers our own call reports about its work.
        parts: of an entry that is no op of its own, the ops it calls.
        own_launch: of our own call, see :class:`Peer`.
    """

    op: str
    shapes: tuple[Shape, ...]
    passes: tuple[Pass, ...]
    make_inputs: Callable[[Shape, torch.device, torch.dtype], Inputs]
    ours: Make
    peers: tuple[Peer, ...]
    bytes_moved: Callable[[Shape, torch.dtype, Pass], int]
    flops: Callable[[Shape, Pass], int]
    tests: str
    unit: Make | None = None
    truth: Callable[[Inputs], Tensor] | None = None
    check: Callable[[Inputs, Any, Tensor], dict[str, float]] | None = None
    hard: Callable[[Inputs], Inputs] | None = None
    stats: Callable[[Inputs], dict[str, float]] | None = None
    parts: tuple[str, ...] = ()
    own_launch: bool = False

    def rows(self) -> tuple[Peer, ...]:
        """Our op once for every row of the dispatch table, forced: ``latent_rl (triton)``."""
        if self.parts:
            return ()
        names = [name for name, _ in backends.explain(self.op)]
        note = "ours, forced: LATENT_RL_BACKEND"
        return tuple(Peer(row_name(n), self.ours, backend=n, note=note) for n in names)

    def contestants(self) -> tuple[Peer, ...]:
        """Our op, the unit, the peers and our op's rows: everything that can be timed."""
        units = tuple(
            Peer(name, self.unit, devices=(device,))
            for device, name in UNITS.items()
            if self.unit is not None
        )
        ours = Peer(OURS, self.ours, own_launch=self.own_launch)
        return (ours, *units, *self.peers, *self.rows())

    def contestant(self, name: str) -> Peer:
        return next(peer for peer in self.contestants() if peer.name == name)


def row_name(backend: str) -> str:
    """The contestant that is our op served by one row of the dispatch table."""
    return f"{OURS} ({backend})"


def entries() -> dict[str, Entry]:
    """All entries under ``benchmarks/ops``, by op name."""
    package = importlib.import_module("benchmarks.ops")
    modules = (
        importlib.import_module(f"benchmarks.ops.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    )
    return {module.ENTRY.op: module.ENTRY for module in modules}
