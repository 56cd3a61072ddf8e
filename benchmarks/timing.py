"""Timing one contestant: turns of calls, percentiles, the clocks of a CPU and of a GPU.

On a GPU each call is timed with device events on torch's current stream after the L2 cache was
flushed, and short calls are captured into a CUDA graph first, so that neither a warm cache nor the
launch overhead of Python stands in the number. A contestant that works on a stream of its own is
timed by the host's clock between two synchronisations.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.registry import Call

Clock = Callable[[Call], float]

# Five times the L2 of an H200.
FLUSH_BYTES = 256 * 2**20
# A turn lasts about this long, at most so many calls; a longer call is timed once per turn, without
# an untimed call before it.
TURN_MS, MAX_CALLS = 40.0, 64
# Below this, launch overhead shows: the call is captured into a graph where that can be done.
CAPTURE_BELOW_MS = 0.5


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call over all rounds."""

    median_ms: float
    p20_ms: float
    p25_ms: float
    p80_ms: float
    samples: int

    @property
    def spread(self) -> float:
        """How far the fast and the slow calls lie apart, relative to the 25th percentile."""
        return (self.p80_ms - self.p20_ms) / self.p25_ms


def summarise(samples_ms: list[float]) -> Timing:
    p20, p25, p50, p80 = np.percentile(samples_ms, [20, 25, 50, 80])
    return Timing(float(p50), float(p20), float(p25), float(p80), len(samples_ms))


def host_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def event_clock(device: torch.device) -> Clock:
    """Times a call between two device events, the L2 cache flushed before the first."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return clock


def synchronised_clock(device: torch.device) -> Clock:
    """Times a call by the host's clock, for work on streams that are not torch's."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(call: Call) -> float:
        flush.zero_()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    return clock


def clock_for(device: torch.device, own_stream: bool) -> Clock:
    if device.type == "cpu":
        return host_clock
    return synchronised_clock(device) if own_stream else event_clock(device)


def captured(call: Call, device: torch.device) -> tuple[Call, str]:
    """The replay of a CUDA graph of the call, or the call itself with the reason why not."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        return call, f"not captured: {str(error).splitlines()[0]}"
    # A graph knows addresses alone: the inputs that the call holds must live as long as it does.
    return functools.partial(_replay, graph, call), "CUDA graph"


def _replay(graph: torch.cuda.CUDAGraph, captured_call: Call) -> None:
    graph.replay()


def calls_per_turn(call_ms: float) -> int:
    return max(1, min(MAX_CALLS, int(TURN_MS / max(call_ms, 1e-6))))


def turn(call: Call, clock: Clock, call_ms: float) -> list[float]:
    """One contestant's turn: an untimed call to warm the caches, then timed ones.

    Args:
        call_ms: what a call is known to take, which says how many there are.
    """
    gc.disable()
    try:
        if call_ms < TURN_MS:
            call()
        return [clock(call) for _ in range(calls_per_turn(call_ms))]
    finally:
        gc.enable()
