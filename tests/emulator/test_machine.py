"""The emulator itself: it computes what a device does, and finds what one would not forgive."""

from __future__ import annotations

import shutil
from types import ModuleType

import pytest
import torch
from torch import Tensor

from .build import COMPILER, HERE, Part, load
from .memory import fenced


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER} on this machine")
    return load("probes", (Part("probes", HERE / "probes.cu", HERE / "probes.cpp"),))


def run(probes: ModuleType, name: str) -> Tensor:
    out = fenced(torch.zeros(64))
    probes.probe(name, out.data_ptr())
    return out


def test_a_barrier_makes_shared_memory_visible(probes, in_every_order) -> None:
    out = in_every_order(probes, lambda: run(probes, "exchange"))
    assert out.tolist() == [*range(1, 64), 0]


def test_warp_operations(probes, in_every_order) -> None:
    def by_hand(lane: int) -> float:
        mates = 8 if lane % 2 == 0 else 0
        above, below = min(lane + 1, 31), lane - 2 if lane >= 2 else lane
        return 496 + mates * 1000 + above / 2 + below / 4 + 3 + (16e5 if lane < 16 else 0)

    out = in_every_order(probes, lambda: run(probes, "warp"))
    assert out.tolist() == [by_hand(thread % 32) for thread in range(64)]


@pytest.mark.parametrize("name", ["race", "float_atomic"])
def test_a_race_shows_in_the_result(probes, in_every_order, name) -> None:
    with pytest.raises(AssertionError, match="the threads' order"):
        in_every_order(probes, lambda: run(probes, name))


def test_shared_memory_begins_as_garbage(probes) -> None:
    assert run(probes, "uninitialised").isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_sided", r"divergent barrier: thread 0 waits at .*probes.cu:\d+, thread 32"),
        ("half_warp", "deadlock: thread 0 waits for the lanes of mask ffffffff"),
        ("misaligned", r"misaligned access at .*probes.cu"),
        ("past_array", r"index past an array at .*probes.cu"),
        ("past_tensor", "touched memory that belongs to no tensor"),
        ("past_shared", "wrote past the dynamic shared memory"),
    ],
)
def test_what_a_device_would_not_forgive_is_found(probes, name, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(probes, name)


def test_the_last_byte_of_shared_memory_is_legal(probes) -> None:
    assert run(probes, "inside_shared").eq(0).all()
