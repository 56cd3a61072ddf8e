"""What every op promises, on the backends of this machine; tests/gpu runs the same on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latent_rl import backends
from tests.ops import every_op_checks as checks
from tests.ops.every_op import EVERY_OP

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
CASES = pytest.mark.parametrize("case", EVERY_OP, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels; the reference's sums depend on the batch."""
    monkeypatch.setenv("LATENT_RL_BACKEND", "native")


class Replayed:
    """Stands for a captured graph where nothing can be captured: calls again, into the results."""

    def __init__(self, call: Callable[[], Any], results: Any) -> None:
        self._call, self._results = call, results

    def replay(self) -> None:
        for mine, fresh in zip(self._results, self._call(), strict=True):
            mine.copy_(fresh)


def called_again(call: Callable[[], Any]) -> tuple[Replayed, Any]:
    results = [t.clone() for t in call()]
    return Replayed(call, results), results


def test_every_op_is_here() -> None:
    assert {case.op for case in EVERY_OP} == set(backends.OPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", checks.CHECKS)
@CASES
def test_every_op_keeps_its_promises(case, name, dtype) -> None:
    checks.CHECKS[name](case, CPU, dtype)


@CASES
def test_compiles_whole(case) -> None:
    checks.compiles(case, CPU, torch.float32, "aot_eager")


@CASES
def test_results_follow_their_inputs(case) -> None:
    checks.captured(case, CPU, torch.float32, called_again)


@pytest.mark.parametrize("dtype", DTYPES)
@CASES
def test_inputs_far_apart(case, dtype) -> None:
    checks.far_apart(case, CPU, dtype, far=20_000)
