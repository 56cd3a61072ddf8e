"""Made-up results: rows without measuring anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import Machine
from benchmarks.registry import Pass, entries
from benchmarks.results import Point, Results, Row, row_of
from benchmarks.worker import Failed, Ready

CEILINGS = {
    "copy_gb_per_s": 20.0,
    "gemm_gflop_per_s": {"float32": 100.0, "bfloat16": 200.0},
}
MACHINE = Machine(
    device="a made-up CPU",
    cores=2,
    load_1min=0.0,
    driver="",
    clocks="",
    python="3.11.0",
    torch=torch.__version__,
    latent_rl="0.1.0",
    commit="0123456789ab",
    dirty=False,
)


@pytest.fixture
def machine() -> Machine:
    return MACHINE


@pytest.fixture
def point() -> Point:
    """nearest_code at the first CPU shape of the design."""
    shape = entries()["nearest_code"].shapes[0]
    return Point("nearest_code", shape, Pass.FORWARD, "float32", "cpu", 1)


@pytest.fixture
def make_row(point: Point) -> Callable[..., Row]:
    """A row from milliseconds per contestant; a string stands for why one failed."""

    def make(**times: float | str | list[float]) -> Row:
        names = {"ours": "latent_rl", "gemm": "GEMM32", "mm": "mm+argmin"}
        answers: dict[str, Ready | Failed] = {}
        samples: dict[str, list[float] | Failed] = {}
        for key, value in times.items():
            name = names.get(key, key)
            if isinstance(value, str):
                answers[name] = Failed(value)
                continue
            answers[name] = Ready(call_ms=1.0, setup_s=0.1)
            samples[name] = value if isinstance(value, list) else [value] * 5
        absent = {"FAISS GPU": "runs on cuda only"}
        return row_of(entries()[point.op], point, answers, absent, samples, CEILINGS)

    return make


@pytest.fixture
def make_data(make_row: Callable[..., Row], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A result file's contents with one row."""

    def make(machine: Machine = MACHINE, **times: float | str | list[float]) -> dict[str, Any]:
        results = Results(tmp_path / "made.json", machine)
        results.data["ceilings"]["1"] = CEILINGS
        results.data["rows"].append(make_row(**times))
        return results.data

    return make
