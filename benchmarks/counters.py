"""Hardware counters of our kernels at the shapes declared for a GPU, by Nsight Compute.

``python -m benchmarks counters`` profiles one call of every case in one process, keeps the report,
and writes the slowest kernels into a Markdown file.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ncu
from benchmarks.machine import describe, output_of
from benchmarks.profile import CLOCKS, WARM_UP
from benchmarks.registry import OURS, Pass, Shape, entries
from benchmarks.results import FOLDER
from benchmarks.worker import DTYPES

# Ours begin with an underscore and end with _kernel; torch's and cuBLAS's do not.
KERNELS = rf"regex:^_.*_kernel$|^{ncu.MARKER}$"


@dataclass(frozen=True)
class Case:
    """One call that is profiled."""

    op: str
    shape: Shape
    which: Pass
    dtype: str

    def __str__(self) -> str:
        return f"{self.op} {self.which.value}, {self.shape}, {self.dtype}"


def cases(ops: list[str] | None, device: str = "cuda") -> list[Case]:
    """Every shape declared for the device, in every pass.

    Raises:
        ValueError: for an unknown op.
    """
    known = entries()
    for op in ops or ():
        if op not in known:
            raise ValueError(f"ops: unknown {op!r}; known: {sorted(known)}")
    return [
        Case(entry.op, shape, which, dtype)
        for entry in known.values()
        if ops is None or entry.op in ops
        for shape in entry.shapes
        for dtype in shape.dtypes_on(device)
        for which in entry.passes
    ]


def inside(chosen: list[Case], device: torch.device) -> None:
    """What the profiler watches: per case a marker and one call; the rest lies outside."""
    on_gpu = device.type == "cuda"
    for case in chosen:
        entry = entries()[case.op]
        inputs = entry.make_inputs(case.shape, device, DTYPES[case.dtype])
        call = entry.contestant(OURS).make(inputs, case.which)
        for _ in range(WARM_UP):
            call()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
        call()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        del inputs, call
        if on_gpu:
            torch.cuda.empty_cache()


def command(ops: list[str] | None, report: Path) -> list[str]:
    """The profiler's command line; the clocks are left as they are."""
    return [
        "ncu",
        *CLOCKS,
        "--profile-from-start=off",
        "--target-processes=application-only",
        f"--kernel-name={KERNELS}",
        *(f"--section={section}" for section in ncu.SECTIONS),
        f"--metrics={','.join(ncu.METRICS)}",
        "--force-overwrite",
        f"--export={report}",
        sys.executable,
        "-m",
        "benchmarks",
        "counters",
        "--inside",
        *([f"--ops={','.join(ops)}"] if ops else []),
    ]


def read_command(report: Path) -> list[str]:
    """A report as CSV with one column per metric."""
    return ["ncu", f"--import={report}", "--csv", "--page=raw", "--print-units=base"]


def collect(ops: list[str] | None, out: Path, say: Callable[[str], None]) -> str:
    """Profile, and return the raw page; report and page are kept in ``out``.

    Raises:
        ValueError: without ncu.
        RuntimeError: when it fails, with what it said.
    """
    report = out / "counters.ncu-rep"
    steps = command(ops, report), read_command(report)
    say(shlex.join(steps[0]))
    if shutil.which("ncu") is None:
        raise ValueError("counters: ncu is not on the PATH; the command is printed above")
    out.mkdir(parents=True, exist_ok=True)
    text = ""
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        text = done.stdout
        if done.returncode != 0 or "==ERROR==" in text:
            raise RuntimeError(
                f"{step[0]} exited with {done.returncode}: {(text + done.stderr)[-2000:]}"
            )
    (out / "counters.csv").write_text(text)
    return text


def machine_of(label: str = "", commit: str = "") -> dict[str, Any]:
    """Where the counters were read."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    version = output_of("sh", "-c", "ncu --version | tail -n 1")
    return {**describe(device, label, commit).as_dict(), "ncu": version or "Nsight Compute"}


def save(profiled: list[ncu.Profiled], machine: dict[str, Any], path: Path) -> None:
    """All launches as JSON."""
    rows = [{"case": one.case, **asdict(one.launch)} for one in profiled]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "launches": rows}, indent=1) + "\n")


def default_path(machine: dict[str, Any]) -> Path:
    slug = "-".join("".join(c if c.isalnum() else " " for c in machine["device"].lower()).split())
    return FOLDER / "counters" / f"{slug}-{machine['commit']}.json"
