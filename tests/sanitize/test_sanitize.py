"""The sanitizer's command, parser and driver; running it needs a CUDA device."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latent_rl import backends
from tests.sanitize import __main__ as sanitize
from tests.sanitize import driver, report

OURS = "void latent_rl::cuda::<unnamed>::"
BACKWARD = f"{OURS}_quantize_backward_kernel<float, (int)4>(Args)+0x490 in /p/cuda_impl.cu:210"
WRITES = f"{OURS}_segment_tiles_kernel<float>(Args)+0x50 in /p/segments.cuh:60"
READS = f"{OURS}_segment_tiles_kernel<float>(Args)+0xa0 in /p/segments.cuh:64"
TORCHS = "void at::native::vectorized_elementwise_kernel<(int)4, FillFunctor<float>>(int, T2)+0x11"
CLEAN = f"""========= COMPUTE-SANITIZER
{driver.DONE} 36
========= ERROR SUMMARY: 0 errors
"""
OUT_OF_BOUNDS = f"""========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at {BACKWARD}
=========     by thread (3,0,0) in block (1,0,0)
=========     Access at 0x7f9e3c000400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f9e3c000000 of size 1,024 bytes
=========
========= Invalid __global__ read of size 16 bytes
=========     at _nearest_code_screen_kernel+0x1230 in screen.py:140
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f9e3c000400 is out of bounds
=========
{driver.DONE} 36
========= ERROR SUMMARY: 2 errors
"""
RACE = f"""========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at {WRITES}
=========     and Read access at {READS} [8 hazards]
=========
{driver.DONE} 36
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
ELSEWHERE = f"""========= Uninitialized __global__ memory read of size 4 bytes
=========     at {TORCHS}
=========     by thread (0,0,0) in block (0,0,0)
=========
{driver.DONE} 36
========= ERROR SUMMARY: 1 error
"""
BARRIER = f"""========= Barrier error detected. Divergent thread(s) in block
=========     at latent_rl::cuda::<unnamed>::_sample_codes_kernel(Args)+0x10 in /p/cuda_impl.cu:9
=========     by thread (0,0,0) in block (0,0,0)
=========
{driver.DONE} 36
========= ERROR SUMMARY: 1 error
"""


def test_a_clean_run() -> None:
    verdict = report.parse(CLEAN)
    assert verdict.clean
    assert str(verdict) == "0"


def test_accesses_out_of_bounds_are_ours() -> None:
    verdict = report.parse(OUT_OF_BOUNDS)
    assert not verdict.clean
    assert verdict.ours == 2
    assert [finding.kernel.split("(")[0] for finding in verdict.findings] == [
        "void latent_rl::cuda::<unnamed>::_quantize_backward_kernel<float, ",
        "_nearest_code_screen_kernel",
    ]
    assert verdict.findings[0].what == "Invalid __global__ write of size 4 bytes"


@pytest.mark.parametrize("output", [RACE, BARRIER])
def test_races_and_barriers(output: str) -> None:
    verdict = report.parse(output)
    assert verdict.ours == 1
    assert len(verdict.findings) == 1


def test_what_torch_does_is_counted_apart() -> None:
    verdict = report.parse(ELSEWHERE)
    assert verdict.clean
    assert (verdict.ours, verdict.elsewhere) == (0, 1)
    assert str(verdict) == "0 (+1 elsewhere)"


def test_errors_beyond_those_printed_are_ours() -> None:
    verdict = report.parse(ELSEWHERE.replace("SUMMARY: 1 error", "SUMMARY: 7 errors"))
    assert (verdict.ours, verdict.elsewhere) == (6, 1)
    assert not verdict.clean


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (CLEAN.replace(driver.DONE, "killed"), "unfinished"),
        (f"{driver.DONE} 36\n", "no summary"),
        ("", "no summary"),
        (
            "========= Error: No attachable process found. compute-sanitizer timed-out.\n",
            "no summary",
        ),
    ],
)
def test_silence_is_no_verdict(output: str, problem: str) -> None:
    verdict = report.parse(output)
    assert verdict.problem == problem
    assert not verdict.clean


def test_every_kernel_of_ours_passes_the_filter() -> None:
    """CUDA kernels by their namespace, Triton's by name: none may be missed."""
    for path in (report.ROOT / "kernels").rglob("*.cu"):
        assert f"namespace {report.NAMESPACE} {{" in path.read_text()
    kernels = report.triton_kernels()
    assert "_nearest_code_screen_kernel" in kernels
    sources = [path.read_text() for path in report.ROOT.glob("kernels/*/*.py")]
    launched = {name for text in sources for name in re.findall(r"(_\w+_kernel)\[", text)}
    assert launched == set(kernels)
    memcheck = sanitize.command("memcheck", "quantize")
    assert memcheck.count("--kernel-name") == len(kernels) + 1
    # What an unwatched kernel wrote would pass for uninitialised.
    assert "--kernel-name" not in sanitize.command("initcheck", "quantize")


@pytest.mark.parametrize("op", backends.OPS)
def test_the_driver_calls_every_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "")
    native = tuple(replace(case, cuda_rows=("native",)) for case in driver.EVERY_OP)
    monkeypatch.setattr(driver, "EVERY_OP", native)
    monkeypatch.setattr(driver, "DTYPES", (torch.bfloat16,))
    made = driver.run(op, torch.device("cpu"))
    cases = sum(case.op == op for case in native)
    assert made == cases * len(driver.SIZES) * len(driver.ROWS) > 0


def pretend(monkeypatch: pytest.MonkeyPatch, output: str, code: int = 0) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, output, "")

    monkeypatch.setattr(sanitize.shutil, "which", lambda name: name)
    monkeypatch.setattr(sanitize.subprocess, "run", run)


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [(CLEAN, 0, 0), (OUT_OF_BOUNDS, 0, 1), (CLEAN, 1, 1), ("", 0, 1)],
)
def test_the_exit_code(
    output: str, code: int, expected: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    pretend(monkeypatch, output, code)
    arguments = ["--op", "quantize", "--tool", "memcheck,racecheck", "--out", str(tmp_path)]
    assert sanitize.main(arguments) == expected
    rows = json.loads((tmp_path / "sanitize.json").read_text())["rows"]
    assert [row["tool"] for row in rows] == ["memcheck", "racecheck"]
    assert all(row["clean"] == (expected == 0) for row in rows)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["op", "memcheck", "racecheck"]
    assert shown[1].startswith("quantize")
    assert (tmp_path / "quantize-memcheck.log").read_text() == output


def test_without_the_program_nothing_is_claimed(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert sanitize.main(["--out", str(tmp_path)]) == 2
    assert "not on the PATH" in capsys.readouterr().err


def test_unknown_names_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        sanitize.main(["--tool", "lint"])
    assert "unknown 'lint'" in capsys.readouterr().err
