"""What a process of a sweep does: try a configuration, or time one."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.registry import Inputs, Shape
from benchmarks.timing import captured, clock_for
from benchmarks.tune.spaces import TUNABLES
from benchmarks.worker import DTYPES, reason_of

# Calls that warm clocks and caches before those that count.
WARM_UP = 3


@dataclass(frozen=True)
class Trial:
    """A configuration of an op at a shape; None is the table's choice."""

    op: str
    shape: Shape
    dtype: str
    device: str
    config: Any
    scratch: Path

    @property
    def point(self) -> tuple[str, str, str]:
        return self.op, self.shape.tag, self.dtype


@dataclass(frozen=True)
class Tried:
    """What became of a trial: ``problem`` None when it compiled, ran and was right."""

    problem: str | None
    seconds: float
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0


class Tuner:
    """Holds the inputs of one point between messages."""

    def __init__(self, threads: int) -> None:
        self._held: tuple[tuple[str, str, str], Inputs] | None = None

    def truth(self, trial: Trial) -> None:
        """Compute what is right once, for all processes."""
        inputs = self._inputs(trial)
        torch.save(TUNABLES[trial.op].truth(inputs).cpu(), self._path(trial))

    def trial(self, trial: Trial) -> Tried:
        """Compile, run and check; the compiled kernel stays in Triton's cache on disk."""
        began = time.perf_counter()
        tunable = TUNABLES[trial.op]
        try:
            inputs = self._inputs(trial)
            result = tunable.make(inputs, trial.config)()
            truth = torch.load(self._path(trial), weights_only=True).to(trial.device)
            problem = tunable.problem(inputs, result, truth)
        except Exception as error:  # noqa: BLE001 - whatever a configuration raises is its result
            return Tried(reason_of(error), time.perf_counter() - began)
        seen = resources(tunable.kernels())
        if problem is None and seen["spills"]:
            problem = f"spills {seen['spills']} registers"
        return Tried(problem, time.perf_counter() - began, **seen)

    def times(self, trial: Trial, calls: int) -> list[float] | Tried:
        """Milliseconds of ``calls`` calls: events, a cold L2, a CUDA graph on a device."""
        try:
            inputs = self._inputs(trial)
            device = torch.device(trial.device)
            call = TUNABLES[trial.op].make(inputs, trial.config)
            call()
            if device.type == "cuda":
                call, _ = captured(call, device)
            clock = clock_for(device, own_stream=False)
            for _ in range(WARM_UP if device.type == "cuda" else 0):
                clock(call)
            return [clock(call) for _ in range(calls)]
        except Exception as error:  # noqa: BLE001 - as above
            return Tried(reason_of(error), 0.0)

    def _path(self, trial: Trial) -> Path:
        return trial.scratch / ("-".join(trial.point) + ".pt")

    def _inputs(self, trial: Trial) -> Inputs:
        if self._held is None or self._held[0] != trial.point:
            self._held = None
            gc.collect()
            device = torch.device(trial.device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            make = TUNABLES[trial.op].entry.make_inputs
            self._held = trial.point, make(trial.shape, device, DTYPES[trial.dtype])
        return self._held[1]


def resources(kernels: tuple[Any, ...]) -> dict[str, int]:
    """Of the kernel compiled last; zeros in the interpreter, which compiles nothing."""
    found = {"registers": 0, "spills": 0, "shared_bytes": 0}
    for kernel in kernels:
        for cache in getattr(kernel, "device_caches", {}).values():
            compiled = list(cache[0].values())
            if compiled:
                last = compiled[-1]
                found = {
                    "registers": int(getattr(last, "n_regs", None) or 0),
                    "spills": int(getattr(last, "n_spills", None) or 0),
                    "shared_bytes": int(last.metadata.shared),
                }
    return found
