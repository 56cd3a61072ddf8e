"""The sweep of tile configurations: which are tried, which dropped, what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.registry import Shape
from benchmarks.tune import sweep, tuner
from benchmarks.tune.model import Chip, Work
from benchmarks.tune.spaces import TUNABLES, far_off
from benchmarks.tune.sweep import Found, Plan, Point
from benchmarks.tune.tuner import Trial, Tried, Tuner

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
WORK = Work(
    programs=1000,
    flops=1e12,
    memory_bytes=1e6,
    cache_bytes=1e6,
    accumulators=128 * 128,
    shared_bytes=96 * 1024,
    loads_in_flight=3,
    tile=(128, 128),
    warps=8,
)


@dataclass(frozen=True)
class Tile:
    rows: int
    warps: int


class TestModel:
    def test_the_longest_of_products_memory_and_cache_decides(self) -> None:
        chip = Chip()
        assert WORK.predicted_us(chip, 2) > 1e12 / (chip.tflops * 1e6)
        streaming = replace(WORK, flops=1.0, memory_bytes=8.6e9)
        assert 2000 < streaming.predicted_us(chip, 2) < 3000
        # float32 runs at half the rate, a small tile starves the units.
        assert WORK.predicted_us(chip, 4) > 1.5 * WORK.predicted_us(chip, 2)
        assert replace(WORK, tile=(16, 16)).predicted_us(chip, 2) > 2 * WORK.predicted_us(chip, 2)

    def test_what_cannot_run_is_not_tried(self) -> None:
        assert WORK.fits(Chip())
        assert not replace(WORK, shared_bytes=228 * 1024).fits(Chip())
        assert not replace(WORK, accumulators=256 * 256).fits(Chip())

    @pytest.mark.parametrize("op", TUNABLES)
    def test_every_gpu_shape_has_candidates_and_the_table_s_choice_first(self, op: str) -> None:
        tunable = TUNABLES[op]
        for shape in tunable.entry.shapes:
            for dtype in shape.dtypes_on("cuda"):
                element = getattr(torch, dtype)
                present = tunable.present(shape, element, CPU)
                found = sweep.candidates(tunable, shape, element, present)
                assert found[0].config == present
                configs = [f.config for f in found]
                assert len(set(configs)) == len(configs) >= 20
                times = [f.predicted_us for f in found[1:]]
                assert times == sorted(times)
                # The table's own tiles are within what the model lets through.
                assert tunable.work(present, shape, element).fits(Chip())


class TestTuner:
    @pytest.fixture
    def trial(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trial:
        def make(inputs, config):
            if config.rows == 0:
                raise RuntimeError("out of resource: shared memory\nmore")
            return lambda: inputs["x"] * (2 if config.rows == 1 else 3)

        inputs = {"x": torch.arange(4.0)}
        fake = SimpleNamespace(
            entry=SimpleNamespace(make_inputs=lambda *at: inputs),
            make=make,
            truth=lambda t: t["x"] * 2,
            problem=far_off,
            kernels=lambda: (KERNEL,),
        )
        monkeypatch.setattr(tuner, "TUNABLES", {"fake": fake})
        return Trial("fake", Shape({"N": 4}), "float32", "cpu", Tile(1, 4), tmp_path)

    def test_right_wrong_and_broken(self, trial: Trial) -> None:
        KERNEL.device_caches = {}
        one = Tuner(1)
        one.truth(trial)
        assert one.trial(trial).problem is None
        assert one.trial(replace(trial, config=Tile(2, 4))).problem == (
            "relative error 0.5 above 0.0001"
        )
        assert one.trial(replace(trial, config=Tile(0, 4))).problem == (
            "RuntimeError: out of resource: shared memory"
        )
        assert len(one.times(trial, 5)) == 5

    def test_what_spills_is_dropped(self, trial: Trial) -> None:
        compiled = SimpleNamespace(n_regs=255, n_spills=8, metadata=SimpleNamespace(shared=1024))
        KERNEL.device_caches = {0: ({"key": compiled}, "binder")}
        one = Tuner(1)
        one.truth(trial)
        tried = one.trial(trial)
        assert tried.problem == "spills 8 registers"
        assert (tried.registers, tried.shared_bytes) == (255, 1024)


KERNEL = SimpleNamespace(device_caches={})


def point(tag: int, *found: tuple[Tile, float | str]) -> Point:
    entries = []
    for tile, outcome in found:
        problem = outcome if isinstance(outcome, str) else None
        times = [] if isinstance(outcome, str) else [outcome] * 3
        entries.append(Found(tile, 5.0, Tried(problem, 0.1, 100, 0, 2048), times))
    return Point("fake", Shape({"N": tag}), "float32", found[0][0], entries)


class TestReport:
    def test_the_best_the_present_and_what_was_dropped(self) -> None:
        # Seven were timed; the table's choice is the slowest, and is shown all the same.
        others = [(Tile(rows, 8), rows / 1e3) for rows in range(1, 7)]
        made = point(8, (Tile(99, 4), 0.099), *others, (Tile(7, 1), "spills 9 registers"))
        lines = sweep.lines_of(made)
        assert lines[0] == "fake N=8 float32: 7 timed of 8 tried"
        assert lines[1].startswith("  Tile(1, 8)")
        assert "1.00 us" in lines[1]
        assert sum(line.startswith("  Tile(") for line in lines) == 6
        assert any("Tile(99, 4)" in line and "<- the table's" in line for line in lines)
        assert "  dropped 1: spills" in lines
        assert lines[-1] == "  paste: Tile(1, 8),  # N=8 float32"

    def test_one_choice_for_all_shapes(self) -> None:
        fast, even, lost = Tile(1, 1), Tile(2, 2), Tile(3, 3)
        points = [
            point(8, (fast, 1.0), (even, 1.1), (lost, 9.0)),
            point(9, (fast, 4.0), (even, 2.0)),
        ]
        (line,) = sweep.shared_choices(points)
        assert line == (
            "fake float32, one for all 2 shapes: Tile(2, 2) (1.049x of each shape's own best)"
        )


def plan(**more: object) -> Plan:
    values = {"ops": ("nearest_code",), "device": "cpu", "budget_s": 60.0, "limit": 2, "workers": 1}
    return Plan(**{**values, **more})


def test_points_are_those_declared() -> None:
    found = plan(device="cuda", ops=tuple(TUNABLES)).points()
    assert {op for op, _, _ in found} == set(TUNABLES)
    assert all(dtype in shape.dtypes_on("cuda") for _, shape, dtype in found)
    (own,) = plan(shapes=("40x16x8",)).points()
    assert own == ("nearest_code", Shape({"N": 40, "D": 16, "K": 8}), "float32")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ops": ("quantize",)}, r"ops: \['quantize'\] have no table"),
        ({"shapes": ("40x16",)}, "shapes: nearest_code takes NxDxK, got '40x16'"),
    ],
)
def test_what_does_not_exist_is_refused(more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**more).points()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "sizes"),
    [("nearest_code", "20x16x8"), ("gated_merge", "16x16x16x3"), ("slot_attention", "2x2x8x2x1x8")],
)
def test_a_sweep_in_the_interpreter(op: str, sizes: str, tmp_path: Path) -> None:
    output = tmp_path / "tuned.json"
    command = [sys.executable, "-m", "benchmarks", "tune", op, "--device", "cpu"]
    command += ["--shapes", sizes, "--limit", "2", "--workers", "1", "--output", str(output)]
    command += ["--dtype", "float16"] if op == "gated_merge" else []
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 timed of 2 tried" in done.stdout
    assert "paste: Config(" in done.stdout
    (swept,) = json.loads(output.read_text())["points"]
    assert [c["tried"]["problem"] for c in swept["candidates"]] == [None, None]
