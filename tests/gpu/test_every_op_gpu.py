"""What every op promises, on a CUDA device, for every row of the dispatch table that serves it.

The checks are those of ``tests/ops/test_every_op.py``; README.md beside this says which op has
which property tested where.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from latent_rl import backends
from tests.ops import every_op_checks as checks
from tests.ops.every_op import EVERY_OP, NO_FLOAT32, OpCase

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Served(NamedTuple):
    """A case under one row of the dispatch table."""

    case: OpCase
    row: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.case.name}-{self.row}-{self.dtype}".replace("torch.", "")


SERVED = tuple(
    Served(case, row, dtype)
    for case in EVERY_OP
    for row in case.cuda_rows
    for dtype in DTYPES
    # The rows before them take that.
    if dtype != torch.float32 or (case.op, row) not in NO_FLOAT32
)


@pytest.fixture(params=SERVED, ids=str)
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Every combination, with its row forced."""
    chosen: Served = request.param
    wanted = backends.Request(torch.device("cuda"), chosen.dtype)
    reason = dict(backends.explain(chosen.case.op, wanted))[chosen.row]
    if chosen.row == "hopper" and reason is not None:
        pytest.skip(f"hopper {reason}")
    monkeypatch.setenv("LATENT_RL_BACKEND", f"{chosen.case.op}={chosen.row}")
    return chosen


def test_every_op_has_its_rows_here() -> None:
    device = torch.device("cuda")
    tested = {(served.case.op, served.row) for served in SERVED}
    for op in backends.OPS:
        request = backends.Request(device, torch.bfloat16)
        rows = {name for name, why_not in backends.explain(op, request) if why_not is None}
        here = {row for name, row in tested if name == op}
        assert rows - {"reference"} == here - ({"hopper"} - rows)


@pytest.mark.parametrize("name", checks.CHECKS)
def test_every_op_keeps_its_promises(cuda, served, name) -> None:
    checks.CHECKS[name](served.case, cuda, served.dtype)


def test_a_graph_follows_inputs_and_seeds(cuda, served, capture) -> None:
    checks.captured(served.case, cuda, served.dtype, capture)


@pytest.mark.parametrize(
    "served",
    [s for s in SERVED if s.dtype == torch.bfloat16],
    ids=str,
    indirect=True,
)
def test_compiles_whole(cuda, served) -> None:
    checks.compiles(served.case, cuda, served.dtype, "inductor")


def test_on_a_device_that_is_not_current(other_cuda, served) -> None:
    before = torch.cuda.current_device()
    for name in ("equals the CPU", "strides", "streams"):
        checks.CHECKS[name](served.case, other_cuda, served.dtype)
    assert torch.cuda.current_device() == before


@pytest.mark.parametrize(
    "served", [s for s in SERVED if s.dtype != torch.float16], ids=str, indirect=True
)
def test_offsets_of_inputs_far_apart(cuda, served) -> None:
    free, _ = torch.cuda.mem_get_info(cuda)
    # One spread input at a time, and what a contiguous copy of it takes.
    if free < 3 * checks.FAR * served.dtype.itemsize:
        pytest.skip("needs 10 or 20 GB of device memory")
    checks.far_apart(served.case, cuda, served.dtype)
