"""The profiling command: what it starts and what it records."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import benchmarks.__main__ as command_line
from benchmarks import profile
from benchmarks.profile import Target

TINY = ["profile", "nearest_code", "--shape", "40x8x5", "--repeats", "3"]


def invoke(*arguments: str):
    return CliRunner().invoke(command_line.app, [*TINY, *arguments])


def test_commands_are_exact(tmp_path: Path) -> None:
    done = invoke("--tool", "commands", "--out", str(tmp_path))
    assert done.exit_code == 0
    nsys, ncu = done.output.strip().splitlines()
    assert nsys.startswith("nsys profile --trace=cuda,nvtx")
    assert "--capture-range=cudaProfilerApi" in nsys
    assert "--nvtx-include=latent_rl@benchmark/" in ncu
    for command in (nsys, ncu):
        assert f"{tmp_path}/nearest_code-forward-40x8x5-float32-cpu" in command
        assert command.endswith("--repeats=3 --threads=1 --tool=inside")


def test_what_a_profiler_starts_runs() -> None:
    arguments = Target("nearest_code", "40x8x5", repeats=2).inner_command()
    done = CliRunner().invoke(command_line.app, arguments[arguments.index("profile") :])
    assert done.exit_code == 0, done.output


def test_the_warm_up_lies_outside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    @contextmanager
    def annotate(message: str, domain: str):
        log.append(f"push {domain} {message}")
        yield
        log.append("pop")

    monkeypatch.setattr(profile.nvtx, "annotate", annotate)
    profile.repeat(lambda: log.append("call"), Target("nearest_code", "", repeats=2))
    warm_up = ["call"] * profile.WARM_UP
    assert log == [*warm_up, "push latent_rl benchmark", "call", "call", "pop"]


def test_torch_profiles_a_cpu(tmp_path: Path) -> None:
    done = invoke("--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "latent_rl::nearest_code" in done.output
    assert (tmp_path / "nearest_code-forward-40x8x5-float32-cpu.json").stat().st_size > 0


def test_a_missing_tool_leaves_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    done = invoke("--tool", "nsys")
    assert done.exit_code == 2
    assert "nsys is not on the PATH" in done.output
    assert "nsys profile" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tool", "gprof"), "tool: expected nsys, ncu, torch or commands"),
        (("--peer", "nope"), "peer: unknown 'nope'"),
        (("--dtype", "float8"), "dtype: unknown"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.output
