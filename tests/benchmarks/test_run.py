"""The run command, from options to files; one tiny run goes the whole way."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import benchmarks.__main__ as command_line
from benchmarks import report, results
from benchmarks import run as running
from benchmarks.registry import Pass, Peer, Shape, entries
from benchmarks.ring import Process, Ring
from benchmarks.run import Options, points
from benchmarks.worker import Contestant, Failed, Ready, Task


def task(contestant: str = "latent_rl", op: str = "nearest_code", **more: object) -> Task:
    shape = Shape({"N": 40, "D": 8, "K": 5})
    values = {"dtype": "float32", "device": "cpu", "scratch": Path(os.devnull).parent, **more}
    return Task(contestant, op, shape, Pass.FORWARD, **values)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (Options(ops=["nope"]), r"ops: unknown \['nope'\]; known: \['code_logprobs'"),
            (Options(peers=["nope"]), "peers: unknown"),
            (Options(dtypes=["float8"]), "dtype: unknown"),
            (Options(passes=["backward"]), "pass: unknown"),
            (Options(device="tpu"), "device: unknown"),
            (Options(threads=(0,)), "threads: expected at least 1"),
        ],
    )
    def test_what_does_not_exist_is_refused(self, options: Options, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            options.check()

    def test_everything_declared_is_planned_once(self) -> None:
        plan = list(points(Options(), 1))
        assert len({point.key for point in plan}) == len(plan)
        assert {point.op for point in plan} == set(entries())
        assert not any(point.shape["N"] == 1_000_000 for point in plan if point.op == "quantize")

    def test_filters(self) -> None:
        options = Options(ops=["quantize"], dtypes=["float32"], passes=["forward"])
        plan = list(points(options, 2))
        assert {(p.op, p.dtype, p.which, p.threads) for p in plan} == {
            ("quantize", "float32", Pass.FORWARD, 2)
        }

    def test_a_shape_of_ones_own(self) -> None:
        options = Options(ops=["nearest_code"], shapes=["100x16x8", "8192x2048x128"])
        tags = {point.shape.tag for point in points(options, 1)}
        assert tags == {"100x16x8", "8192x2048x128"}
        with pytest.raises(ValueError, match=r"shapes: nearest_code takes NxDxK, got '100x16'"):
            list(points(Options(ops=["nearest_code"], shapes=["100x16"]), 1))

    def test_no_markers_no_run(self, tmp_path: Path) -> None:
        arguments = ["run", "--summary", str(tmp_path / "README.md")]
        done = CliRunner().invoke(command_line.app, arguments)
        assert done.exit_code == 2
        assert "expected the lines" in done.output


class TestContestant:
    """What a process does, in this one."""

    def test_prepares_checks_and_takes_turns(self, tmp_path: Path) -> None:
        contestant = Contestant(threads=1)
        answer = contestant.prepare(task(scratch=tmp_path))
        assert isinstance(answer, Ready)
        assert answer.quality["wrong_rows"] == answer.quality["hard_wrong_rows"] == 0
        times = contestant.turn(answer.call_ms)
        assert isinstance(times, list)
        assert min(times) > 0
        contestant.release()
        assert contestant.turn(1.0) == Failed("was not prepared")

    def test_the_unit_is_not_checked(self, tmp_path: Path) -> None:
        answer = Contestant(threads=1).prepare(task("GEMM32", scratch=tmp_path))
        assert isinstance(answer, Ready)
        assert answer.quality == {}
        assert not list(tmp_path.iterdir())

    def test_what_a_peer_raises_is_its_result(self, tmp_path: Path, monkeypatch) -> None:
        def broken(inputs, which):
            raise MemoryError("32 GiB\nand more")

        monkeypatch.setattr(
            "benchmarks.registry.Entry.contestant", lambda self, name: Peer(name, broken)
        )
        answer = Contestant(threads=1).prepare(task(scratch=tmp_path))
        assert answer == Failed("MemoryError: 32 GiB")


class TestRows:
    """Our op once more per row of the dispatch table."""

    def test_a_forced_row_serves_and_is_let_go(self, tmp_path: Path) -> None:
        contestant = Contestant(threads=1)
        before = os.environ.get("LATENT_RL_BACKEND")
        forced = task("latent_rl (reference)", scratch=tmp_path)
        assert isinstance(contestant.prepare(forced), Ready)
        assert os.environ["LATENT_RL_BACKEND"] == "nearest_code=reference"
        assert isinstance(contestant.prepare(task(scratch=tmp_path)), Ready)
        assert os.environ.get("LATENT_RL_BACKEND") == before

    def test_a_row_that_cannot_serve_says_so(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("LATENT_RL_BACKEND", "")
        answer = Contestant(threads=1).prepare(task("latent_rl (triton)", scratch=tmp_path))
        assert isinstance(answer, Failed)
        assert "forces triton, which cannot serve" in answer.reason

    def test_who_takes_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        point = next(iter(points(Options(ops=["gated_merge"]), 1)))
        assert not running.takes_part(point, "reference", Options())
        assert running.takes_part(point, "reference", Options(rows=("reference",)))
        assert not running.takes_part(point, "triton", Options(rows=("triton",)))
        rows = [("cuda", None), ("triton", None), ("native", "CPU"), ("reference", None)]
        monkeypatch.setattr(running.backends, "explain", lambda op, request: rows)
        monkeypatch.setattr(running.backends, "serving", lambda op, device, dtype: "cuda")
        on_gpu = replace(point, device="cuda")
        taking = [name for name, _ in rows if running.takes_part(on_gpu, name, Options())]
        assert taking == ["triton"]

    def test_a_row_takes_part_where_its_widths_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def explain(op: str, request: Any) -> list[tuple[str, str | None]]:
            return [("hopper", None if request.width <= 256 else "wide")]

        monkeypatch.setattr(running.backends, "explain", explain)
        options = Options(ops=["nearest_code"], rows=("hopper",))
        taking = {
            point.shape["D"]
            for point in points(options, 1)
            if running.takes_part(point, "hopper", options)
        }
        assert 64 in taking
        assert 2048 not in taking


def test_what_was_preheated_is_not_built_again(tmp_path: Path, monkeypatch) -> None:
    built = []
    make = entries()["nearest_code"].make_inputs
    entry = replace(
        entries()["nearest_code"], make_inputs=lambda *a: (built.append(1), make(*a))[1]
    )
    monkeypatch.setattr("benchmarks.worker.entries", lambda: {"nearest_code": entry})
    contestant = Contestant(threads=1)
    assert contestant.preheat(task(scratch=tmp_path)) is None
    assert isinstance(contestant.prepare(task(scratch=tmp_path)), Ready)
    assert len(built) == 1
    assert isinstance(contestant.prepare(task(scratch=tmp_path)), Ready)
    assert len(built) == 2


def test_several_compile_at_once(tmp_path: Path) -> None:
    with Ring(threads=1) as group:
        names = ("latent_rl", "mm+argmin")
        group.preheat({name: task(name, scratch=tmp_path) for name in names}, workers=2)
        for name in names:
            assert isinstance(group[name].prepare(task(name, scratch=tmp_path)), Ready)


class TestProcess:
    def test_a_dead_process_is_a_result_and_the_next_one_works(self, tmp_path: Path) -> None:
        process = Process("latent_rl", threads=1, limit_s=60)
        try:
            assert isinstance(process.prepare(task(scratch=tmp_path)), Ready)
            os.kill(process._process.pid, signal.SIGKILL)
            assert process.turn(1.0) == Failed("its process died with exit code -9")
            assert isinstance(process.prepare(task(scratch=tmp_path)), Ready)
            process.limit_s = 0.0
            assert process.prepare(task(scratch=tmp_path)) == Failed("took longer than 0 s")
        finally:
            process.stop()


def test_out_of_memory_gets_a_second_chance_alone(monkeypatch, tmp_path: Path) -> None:
    class Handle:
        def __init__(self, name: str) -> None:
            self.name, self.tries = name, 0

        def prepare(self, task: Task):
            self.tries += 1
            if self.name == "cdist" and self.tries == 1:
                return Failed("OutOfMemoryError: 32 GiB")
            return Ready(1.0, 0.0)

        def turn(self, call_ms: float):
            return [1.0]

        def release(self) -> None: ...

    handles: dict[str, Handle] = {}
    group = type("Group", (), {"__getitem__": lambda s, n: handles.setdefault(n, Handle(n))})()
    options = Options(ops=["nearest_code"], shapes=["40x8x5"], rounds=5)
    (point,) = points(options, 1)
    ceilings = {"copy_gb_per_s": 1.0, "gemm_gflop_per_s": {"float32": 1.0}}
    row = running.measure(point, group, options, ceilings, tmp_path)
    assert row["contestants"]["cdist"]["status"] == "measured"
    assert row["contestants"]["cdist"]["remark"].startswith("measured alone")
    assert "remark" not in row["contestants"]["latent_rl"]


@pytest.fixture
def quick_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    roofs = {"copy_gb_per_s": 10.0, "gemm_gflop_per_s": {"float32": 50.0, "bfloat16": 80.0}}
    monkeypatch.setattr(Ring, "ceilings", lambda self, device, dtypes: roofs)


@pytest.mark.usefixtures("quick_roofs")
def test_a_tiny_run_end_to_end(tmp_path: Path, machine, monkeypatch) -> None:
    monkeypatch.setattr(running, "describe", lambda *asked: machine)
    output, readme = tmp_path / "out.json", tmp_path / "README.md"
    readme.write_text("# title\n" + "\n".join(report.MARKERS["cpu"]) + "\n")
    arguments = ["run", "--ops", "nearest_code", "--shapes", "64x8x16", "--rounds", "5"]
    arguments += ["--peers", "mm+argmin", "--threads", "1"]
    arguments += ["--output", str(output), "--summary", str(readme)]
    done = CliRunner().invoke(command_line.app, arguments)
    assert done.exit_code == 0, done.output
    (row,) = results.load(output)["rows"]
    assert set(row["speedup"]) == {"GEMM32", "mm+argmin"}
    assert row["contestants"]["latent_rl"]["quality"]["wrong_rows"] == 0
    assert row["contestants"]["latent_rl"]["timing"]["samples"] >= 5
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert "| `nearest_code` | forward | N 64 D 8 K 16 | float32 |" in readme.read_text()
    again = CliRunner().invoke(command_line.app, arguments)
    assert again.exit_code == 0
    assert "resuming out.json: 1 rows are there already" in again.output
    assert len(results.load(output)["rows"]) == 1


@pytest.mark.usefixtures("quick_roofs")
def test_a_broken_row_costs_no_other(tmp_path: Path, machine, make_row, monkeypatch) -> None:
    monkeypatch.setattr(running, "describe", lambda *asked: machine)

    def measure(point, *rest):
        if point.shape.tag == "8x8x8":
            raise KeyError("no such thing")
        return make_row(ours=50.0, gemm=40.0)

    monkeypatch.setattr(running, "measure", measure)
    arguments = ["run", "--ops", "nearest_code", "--shapes", "8x8x8,8192x2048x128"]
    arguments += ["--dtype", "float32", "--output", str(tmp_path / "out.json")]
    done = CliRunner().invoke(command_line.app, arguments)
    assert done.exit_code == 1
    assert "not measured: nearest_code forward N=8 D=8 K=8" in done.output
    assert len(results.load(tmp_path / "out.json")["rows"]) == 1


@pytest.mark.usefixtures("quick_roofs")
def test_no_row_begins_after_the_time_limit(tmp_path: Path, machine, monkeypatch) -> None:
    monkeypatch.setattr(running, "describe", lambda *asked: machine)
    output = tmp_path / "out.json"
    arguments = ["run", "--ops", "nearest_code", "--shapes", "64x8x16", "--time-limit-s", "0"]
    done = CliRunner().invoke(command_line.app, [*arguments, "--output", str(output)])
    assert done.exit_code == 1
    assert "1 rows: the time limit was reached; run again to resume" in done.output
