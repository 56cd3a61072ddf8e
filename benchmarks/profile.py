"""One op at one shape under a profiler: a fixed number of calls, the warm-up outside the range.

``python -m benchmarks profile OP`` prints the exact ``nsys`` and ``ncu`` commands, runs the one
asked for, or, without either, torch's own profiler.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nvtx
import torch

from benchmarks.registry import Call, Pass, entries
from benchmarks.run import Options, selected_shapes
from benchmarks.worker import DTYPES, set_threads

DOMAIN, RANGE = "latent_rl", "benchmark"
WARM_UP = 5
# ncu would lock the clocks at their base: times would not be those of the benchmark, and a shared
# device's settings are not ours to change.
CLOCKS = ("--clock-control=none",)


@dataclass(frozen=True)
class Target:
    """What is profiled."""

    op: str
    shape: str
    device: str = "cpu"
    dtype: str = "float32"
    which: Pass = Pass.FORWARD
    contestant: str = "latent_rl"
    repeats: int = 10
    threads: int = 1

    @property
    def name(self) -> str:
        return f"{self.op}-{self.which.name.lower()}-{self.shape}-{self.dtype}-{self.device}"

    def inner_command(self) -> list[str]:
        """The program a profiler starts: this module, calling the op and nothing else."""
        return [
            sys.executable,
            "-m",
            "benchmarks",
            "profile",
            self.op,
            f"--shape={self.shape}",
            f"--device={self.device}",
            f"--dtype={self.dtype}",
            f"--pass={self.which.value}",
            f"--peer={self.contestant}",
            f"--repeats={self.repeats}",
            f"--threads={self.threads}",
            "--tool=inside",
        ]

    def call(self) -> Call:
        """The call to repeat.

        Raises:
            ValueError: for a shape that the op does not take.
        """
        entry = entries()[self.op]
        options = Options(device=self.device, ops=[self.op], shapes=[self.shape])
        (shape,) = selected_shapes(entry, options)
        inputs = entry.make_inputs(shape, torch.device(self.device), DTYPES[self.dtype])
        return entry.contestant(self.contestant).make(inputs, self.which)


def nsys_command(target: Target, out: Path) -> list[str]:
    """Timeline of the range alone, with CUDA, NVTX and the libraries underneath."""
    return [
        "nsys",
        "profile",
        "--trace=cuda,nvtx,osrt,cublas",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        "--stats=true",
        "--force-overwrite=true",
        f"--output={out / target.name}",
        *target.inner_command(),
    ]


def ncu_command(target: Target, out: Path) -> list[str]:
    """Every counter of every kernel launched inside the range."""
    return [
        "ncu",
        *CLOCKS,
        "--nvtx",
        f"--nvtx-include={DOMAIN}@{RANGE}/",
        "--profile-from-start=off",
        "--target-processes=all",
        "--graph-profiling=node",
        "--set=full",
        "--force-overwrite",
        f"--export={out / target.name}",
        *target.inner_command(),
    ]


def repeat(call: Call, target: Target) -> None:
    """Warm up, then call ``repeats`` times inside one NVTX range and the profiler's window."""
    on_gpu = target.device == "cuda"
    for _ in range(WARM_UP):
        call()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    with nvtx.annotate(RANGE, domain=DOMAIN):
        for _ in range(target.repeats):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    if on_gpu:
        torch.cuda.profiler.stop()


def torch_profile(call: Call, target: Target, out: Path, say: Callable[[str], None]) -> Path:
    """torch's own profiler: a table by op and a trace for chrome://tracing or Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if target.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(WARM_UP):
        call()
    profiler: Any = torch.profiler.profile(activities=activities, record_shapes=True)
    with profiler, torch.profiler.record_function(RANGE):
        for _ in range(target.repeats):
            call()
        if target.device == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if target.device == "cuda" else "self_cpu_time_total"
    say(profiler.key_averages().table(sort_by=key, row_limit=12))
    out.mkdir(parents=True, exist_ok=True)
    trace = out / f"{target.name}.json"
    profiler.export_chrome_trace(str(trace))
    return trace


def profile(target: Target, tool: str, out: Path, say: Callable[[str], None]) -> int:
    """Run one tool on the target and return its exit code.

    Args:
        tool: nsys, ncu, torch; "inside" only calls the op (what the others start); "commands"
            only prints.

    Raises:
        ValueError: for an unknown tool or one that is not installed, and for unknown names.
    """
    commands = {"nsys": nsys_command(target, out), "ncu": ncu_command(target, out)}
    if tool not in (*commands, "torch", "inside", "commands"):
        raise ValueError(f"tool: expected nsys, ncu, torch or commands, got {tool!r}")
    set_threads(target.threads)
    if tool == "inside":
        repeat(target.call(), target)
        return 0
    for command in commands.values():
        say(shlex.join(command))
    if tool == "commands":
        return 0
    if tool == "torch":
        say(f"trace: {torch_profile(target.call(), target, out, say)}")
        return 0
    if shutil.which(tool) is None:
        raise ValueError(f"tool: {tool} is not on the PATH; the command is printed above")
    out.mkdir(parents=True, exist_ok=True)
    return subprocess.run(commands[tool], check=False).returncode
