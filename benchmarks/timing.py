"""Timing: warm-up, interleaved rounds, percentiles; device events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.registry import Call

FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call over the rounds."""

    median_ms: float
    p20_ms: float
    p25_ms: float
    p80_ms: float
    rounds: int


def summarise(samples_ms: list[float]) -> Timing:
    p20, p25, p50, p80 = np.percentile(samples_ms, [20, 25, 50, 80])
    return Timing(float(p50), float(p20), float(p25), float(p80), len(samples_ms))


def clock_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def cuda_clock(device: torch.device) -> Callable[[Call], float]:
    """Times one call with device events after flushing the L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(call: Call) -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return clock


def interleave(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int, budget_s: float
) -> dict[str, Timing]:
    """Times every call once per round, so that drift of the machine hits all alike.

    Stops after ``rounds`` rounds, or after ``budget_s`` seconds and at least five rounds.
    """
    clock = cuda_clock(device) if device.type == "cuda" else clock_cpu
    for call in calls.values():
        call()
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.monotonic() + budget_s
    for done in range(rounds):
        if done >= 5 and time.monotonic() > deadline:
            break
        for name, call in calls.items():
            samples[name].append(clock(call))
    return {name: summarise(values) for name, values in samples.items()}
