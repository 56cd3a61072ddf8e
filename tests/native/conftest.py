"""Fixtures of the C++ backend's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from latent_rl import _C

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512bf16")


def available_instruction_sets() -> list[str]:
    """The instruction sets this processor can run."""
    chosen = _C.isa()
    found = []
    for name in INSTRUCTION_SETS:
        try:
            _C.select_isa(name)
        except ValueError:
            continue
        found.append(name)
    _C.select_isa(chosen)
    return found


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set; those the processor lacks are skipped."""
    chosen = _C.isa()
    try:
        _C.select_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _C.select_isa(chosen)


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """The available instruction sets, with the one in use put back afterwards."""
    chosen = _C.isa()
    yield available_instruction_sets()
    _C.select_isa(chosen)


@pytest.fixture(autouse=True)
def _threads_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
