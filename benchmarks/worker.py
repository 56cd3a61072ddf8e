"""A process of its own for every contestant, so that none shares threads or libraries with another.

The parent sends a :class:`Task` and gets a :class:`Ready` (or a :class:`Failed`), then asks for
turns. Processes are forked from a server that has only imported torch and started no thread.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import measure_ceilings
from benchmarks.registry import OURS, UNITS, Call, Entry, Inputs, Pass, Shape, entries
from benchmarks.timing import (
    CAPTURE_BELOW_MS,
    Clock,
    captured,
    clock_for,
    turn,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Task:
    """What to prepare: one contestant at one point."""

    contestant: str
    op: str
    shape: Shape
    which: Pass
    dtype: str
    device: str
    scratch: Path


@dataclass(frozen=True)
class Ready:
    """A contestant that can be timed."""

    call_ms: float
    setup_s: float
    remark: str = ""
    quality: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A contestant that cannot, and why."""

    reason: str


def set_threads(threads: int) -> None:
    """Give torch and every thread pool already loaded the same number of threads."""
    torch.set_num_threads(threads)
    try:
        import threadpoolctl
    except ImportError:
        return
    threadpoolctl.threadpool_limits(threads)


def reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@dataclass(frozen=True)
class Prepared:
    """A call and the clock that times it."""

    call: Call
    clock: Clock

    def warm(self) -> float:
        """Time of a call once warm: of a slow one the next, of a fast one the least of three."""
        first = self.clock(self.call)
        return first if first > 200 else min(self.clock(self.call) for _ in range(3))


class Contestant:
    """What a process holds between messages."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.device = torch.device("cpu")
        self.prepared: Prepared | None = None

    def prepare(self, task: Task) -> Ready | Failed:
        """Build inputs and call, warm up, check the result."""
        started = time.perf_counter()
        try:
            return self._prepare(task, started)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
            self.release()
            return Failed(reason_of(error))

    def _prepare(self, task: Task, started: float) -> Ready:
        entry = entries()[task.op]
        peer = entry.contestant(task.contestant)
        self.device = torch.device(task.device)
        inputs = entry.make_inputs(task.shape, self.device, DTYPES[task.dtype])
        call = peer.make(inputs, task.which)
        # A package imported by `make` brings its own pools.
        set_threads(self.threads)
        result = call()
        setup_s = time.perf_counter() - started
        quality = check(entry, task, inputs, result)
        del result
        self.prepared = Prepared(call, clock_for(self.device, peer.own_stream))
        call_ms = self.prepared.warm()
        remark = ""
        on_stream = self.device.type == "cuda" and not peer.own_stream
        if on_stream and call_ms < CAPTURE_BELOW_MS:
            call, remark = captured(call, self.device)
            self.prepared = Prepared(call, self.prepared.clock)
        return Ready(call_ms, setup_s, remark, quality)

    def turn(self, call_ms: float) -> list[float] | Failed:
        if self.prepared is None:
            return Failed("was not prepared")
        try:
            return turn(self.prepared.call, self.prepared.clock, call_ms)
        except Exception as error:  # noqa: BLE001 - as above
            self.release()
            return Failed(reason_of(error))
        finally:
            # Memory a peer keeps for later must not make its neighbour run out.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def release(self) -> None:
        self.prepared = None
        if "torch._dynamo" in sys.modules:
            # Every shape is compiled anew; the limit on recompilations must not see them add up.
            torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def ceilings(self, device: str, dtypes: tuple[str, ...]) -> dict[str, object]:
        return measure_ceilings(torch.device(device), tuple(DTYPES[name] for name in dtypes))


def check(entry: Entry, task: Task, inputs: Inputs, result: Any) -> dict[str, float]:
    """Quality of a result, and what our own call says about its work."""
    quality: dict[str, float] = {}
    checked = task.contestant not in UNITS.values()
    if checked and entry.truth is not None and entry.check is not None:
        truth = truth_of(entry.truth, task, inputs, "plain")
        quality |= entry.check(inputs, result, truth)
        if entry.hard is not None:
            hard = entry.hard(inputs)
            answer = entry.contestant(task.contestant).make(hard, task.which)()
            truth = truth_of(entry.truth, task, hard, "hard")
            found = entry.check(hard, answer, truth)
            quality |= {f"hard_{name}": value for name, value in found.items()}
    if entry.stats is not None and task.contestant == OURS:
        quality |= entry.stats(inputs)
    return quality


def truth_of(truth: Callable[[Inputs], Tensor], task: Task, inputs: Inputs, which: str) -> Tensor:
    """The exact result, computed by whoever needs it first; contestants prepare one by one."""
    path = task.scratch / f"{task.op}-{task.shape.tag}-{task.dtype}-{which}.pt"
    if not path.exists():
        torch.save(truth(inputs), path)
    return torch.load(path, weights_only=True).to(task.device)


def serve(connection: Connection, threads: int) -> None:
    """Answer the parent until it closes the connection."""
    set_threads(threads)
    contestant = Contestant(threads)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(contestant, method)(*arguments))
