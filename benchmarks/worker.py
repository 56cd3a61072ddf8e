"""A process of its own for every contestant, so that none shares threads or libraries with another.

The parent sends a :class:`Task` and gets a :class:`Ready` (or a :class:`Failed`), then asks for
turns. Processes are forked from a server that has only imported torch and started no thread.
"""

from __future__ import annotations

import gc
import os
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
from latent_rl import backends

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


@dataclass(frozen=True)
class Started:
    """A call that has been called once."""

    task: Task
    inputs: Inputs
    call: Call
    result: Any
    setup_s: float


class Contestant:
    """What a process holds between messages."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.device = torch.device("cpu")
        self.prepared: Prepared | None = None
        self._started: Started | None = None
        self._asked_backend = os.environ.get(backends.ENVIRONMENT_VARIABLE)

    def preheat(self, task: Task) -> Failed | None:
        """Build inputs and call and call once, which compiles; may run beside other processes."""
        try:
            self._started = self._start(task)
        except Exception as error:  # noqa: BLE001 - as below
            self.release()
            return Failed(reason_of(error))
        return None

    def prepare(self, task: Task) -> Ready | Failed:
        """Build inputs and call, warm up, check the result."""
        try:
            held = self._started
            self._started = None
            return self._prepare(held if held and held.task == task else self._start(task))
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
            self.release()
            return Failed(reason_of(error))

    def _start(self, task: Task) -> Started:
        began = time.perf_counter()
        entry = entries()[task.op]
        peer = entry.contestant(task.contestant)
        self._force(task.op, peer.backend)
        self.device = torch.device(task.device)
        inputs = entry.make_inputs(task.shape, self.device, DTYPES[task.dtype])
        call = peer.make(inputs, task.which)
        # A package imported by `make` brings its own pools.
        set_threads(self.threads)
        result = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            # The neighbours start at the same time.
            torch.cuda.empty_cache()
        return Started(task, inputs, call, result, time.perf_counter() - began)

    def _force(self, op: str, backend: str) -> None:
        """Force a row of the dispatch table, or undo it."""
        if backend:
            os.environ[backends.ENVIRONMENT_VARIABLE] = f"{op}={backend}"
        elif self._asked_backend is None:
            os.environ.pop(backends.ENVIRONMENT_VARIABLE, None)
        else:
            os.environ[backends.ENVIRONMENT_VARIABLE] = self._asked_backend

    def _prepare(self, held: Started) -> Ready:
        task, call = held.task, held.call
        entry = entries()[task.op]
        peer = entry.contestant(task.contestant)
        quality = check(entry, task, held.inputs, held.result)
        self.prepared = Prepared(call, clock_for(self.device, peer.own_stream))
        call_ms = self.prepared.warm()
        remark = ""
        on_stream = self.device.type == "cuda" and not (peer.own_stream or peer.own_launch)
        if on_stream and call_ms < CAPTURE_BELOW_MS:
            call, remark = captured(call, self.device)
            self.prepared = Prepared(call, self.prepared.clock)
        return Ready(call_ms, held.setup_s, remark, quality)

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
        self.prepared = self._started = None
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


def serve(connection: Connection, threads: int, holder: Callable[[int], Any]) -> None:
    """Answer the parent, by methods of ``holder(threads)``, until it closes the connection."""
    set_threads(threads)
    contestant = holder(threads)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(contestant, method)(*arguments))
