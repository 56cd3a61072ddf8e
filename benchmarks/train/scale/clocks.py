"""Clocks and memory of a device: events on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Marks:
    """Moments on the device's own time line, read only after the last of them.

    On a GPU a mark is an event on the current stream: setting it waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        """No marks."""
        self._device = device
        self._marks: list[Any] = []

    def __len__(self) -> int:
        return len(self._marks)

    def set(self) -> None:
        """Mark this moment."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def gaps_ms(self) -> list[float]:
        """Milliseconds between consecutive marks."""
        synchronise(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1e3 * (end - begin) for begin, end in pairs]


def call_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, from an idle device to an idle device."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return 1e3 * (time.perf_counter() - started)


@dataclass
class Spans:
    """Seconds by name, each from an idle device to an idle device; spans may lie in one another."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add what the block takes."""
        synchronise(self.device)
        started = time.perf_counter()
        try:
            yield
        finally:
            synchronise(self.device)
            taken = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + taken

    @contextmanager
    def around(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Let every call of ``owner.attribute`` in the block be a span."""
        original = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return original(*args, **kwargs)

        held = vars(owner).get(attribute)
        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            if held is None:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, held)


@dataclass
class Memory:
    """Bytes on a GPU, None elsewhere.

    Attributes:
        held_bytes: allocated when the block began.
        peak_bytes: the most that was allocated within it.
    """

    held_bytes: int | None = None
    peak_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Memory]:
    """The memory of a block."""
    found = Memory()
    if device.type != "cuda":
        yield found
        return
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    found.held_bytes = torch.cuda.memory_allocated(device)
    try:
        yield found
    finally:
        synchronise(device)
        found.peak_bytes = torch.cuda.max_memory_allocated(device)


def free(device: torch.device) -> None:
    """Give a GPU's memory back that nothing holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def repeated_ms(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each of some calls, after one that does not count."""
    call()
    return [call_ms(call, device) for _ in range(repeats)]


def middle(values: list[float]) -> float:
    """The median."""
    return float(statistics.median(values))
