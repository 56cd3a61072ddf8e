"""``python -m tests.sanitize [--tool memcheck,racecheck] [--op quantize,...]``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from latent_rl import backends
from tests.sanitize import report
from tests.sanitize.report import ROOT, Verdict

PROGRAM = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND, REFUSED = 1, 2
# Python and torch start slowly under a tool, and Triton compiles before the first launch.
LAUNCH_TIMEOUT_S = 300


def command(tool: str, op: str) -> list[str]:
    """How an op runs under a tool.

    Only our kernels are watched. initcheck watches all: it would take what an unwatched kernel
    wrote for uninitialised.
    """
    names = () if tool == "initcheck" else (report.NAMESPACE, *report.triton_kernels())
    return [
        PROGRAM,
        "--tool",
        tool,
        "--launch-timeout",
        str(LAUNCH_TIMEOUT_S),
        "--target-processes",
        "application-only",
        "--report-api-errors",
        "no",
        "--show-backtrace",
        "no",
        "--print-limit",
        "100",
        *(part for name in names for part in ("--kernel-name", f"kns={name}")),
        sys.executable,
        "-m",
        "tests.sanitize.driver",
        op,
    ]


def sanitized(tool: str, op: str, timeout_s: float, logs: Path) -> Verdict:
    """Run one op under one tool; the output is kept in ``logs``."""
    started = time.monotonic()
    # Every tensor an allocation of its own: an access beside it is then out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command(tool, op),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            timeout=timeout_s,
            check=False,
        )
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        parts = (error.stdout, error.stderr)
        output = "".join(
            p.decode(errors="replace") if isinstance(p, bytes) else p or "" for p in parts
        )
        code = None
    (logs / f"{op}-{tool}.log").write_text(output)
    seconds = time.monotonic() - started
    if code is None:
        return Verdict(problem=f"over {timeout_s:.0f} s", seconds=seconds)
    verdict = replace(report.parse(output), seconds=seconds)
    if not verdict.problem and code != 0:
        return replace(verdict, problem=f"exit code {code}")
    return verdict


def table(verdicts: dict[tuple[str, str], Verdict]) -> str:
    """Ops down, tools across: findings in our kernels, or why there is no verdict."""
    ops = list(dict.fromkeys(op for op, _ in verdicts))
    tools = list(dict.fromkeys(tool for _, tool in verdicts))
    lines = ["".join(f"{cell:<24}" for cell in ("op", *tools))]
    for op in ops:
        cells = [f"{verdicts[op, tool]} in {verdicts[op, tool].seconds:.0f} s" for tool in tools]
        lines.append("".join(f"{cell:<24}" for cell in (op, *cells)))
    return "\n".join(line.rstrip() for line in lines)


def as_json(verdicts: dict[tuple[str, str], Verdict]) -> str:
    rows = [
        {
            "op": op,
            "tool": tool,
            "clean": verdict.clean,
            "ours": verdict.ours,
            "elsewhere": verdict.elsewhere,
            "problem": verdict.problem,
            "seconds": round(verdict.seconds, 1),
            "findings": [vars(finding) for finding in verdict.findings[:20]],
        }
        for (op, tool), verdict in verdicts.items()
    ]
    return json.dumps({"rows": rows}, indent=1) + "\n"


def chosen(names: str, known: tuple[str, ...], parser: argparse.ArgumentParser) -> list[str]:
    found = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    for name in found:
        if name not in known:
            parser.error(f"unknown {name!r}; known: {', '.join(known)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 when every tool found nothing, 1 when one did or gave no verdict, 2 when there
    is no compute-sanitizer."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("--tool", default="", help=f"of {', '.join(TOOLS)}; all by default")
    parser.add_argument("--op", default="", help="comma-separated; all by default")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--timeout-s", type=float, default=500.0, help="of one op under one tool")
    parser.add_argument("--out", type=Path, default=Path("runs/sanitize"), help="folder of logs")
    args = parser.parse_args(arguments)
    tools = chosen(args.tool, TOOLS, parser)
    ops = chosen(args.op, backends.OPS, parser)
    if shutil.which(PROGRAM) is None:
        print(f"{PROGRAM} is not on the PATH", file=sys.stderr)
        return REFUSED
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = [(op, tool) for tool in tools for op in ops]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda p: sanitized(p[1], p[0], args.timeout_s, args.out), pairs)
        verdicts = dict(zip(pairs, results, strict=True))
    (args.out / "sanitize.json").write_text(as_json(verdicts))
    print(table(verdicts))
    for (op, tool), verdict in verdicts.items():
        for finding in [finding for finding in verdict.findings if finding.ours][:3]:
            print(f"{tool} {op}: {finding.what} at {finding.kernel or 'an unnamed kernel'}")
    return 0 if all(verdict.clean for verdict in verdicts.values()) else FOUND


if __name__ == "__main__":
    sys.exit(main())
