"""Measure again and compare with the committed results of the same machine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import ROOT, Machine
from benchmarks.registry import OURS, UNITS, entries
from benchmarks.results import IDENTITY, Key, Row, key_of
from benchmarks.timing import Timing

# Below this a difference is never called a change: clocks and neighbours move a run by as much.
LEAST_TOLERANCE = 0.05


class RefusedError(ValueError):
    """The two cannot be compared."""


class OpTestsError(RuntimeError):
    """The op's own tests fail: the speed of a wrong op means nothing."""


@dataclass(frozen=True)
class Verdict:
    """One row against its baseline; ``ratio`` above 1 is slower."""

    key: Key
    ratio: float
    tolerance: float

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + self.tolerance

    def __str__(self) -> str:
        op, sizes, which, dtype, threads = self.key
        word = "SLOWER" if self.slower else "ok"
        return (
            f"{word}: {op} {which} {sizes} {dtype} {threads} threads: {self.ratio:.3f} of the "
            f"baseline's time (tolerance {self.tolerance:.0%})"
        )


def newest_baseline(machine: Machine, folder: Path = results.FOLDER) -> Path:
    """The committed result of this machine whose commit is the latest in the history.

    Raises:
        RefusedError: when there is none, naming the machines there are results of.
    """
    files = [path for path in sorted(folder.glob("*.json")) if _schema(path) == results.SCHEMA]
    machines = {path: results.load(path)["machine"] for path in files}
    mine = [
        path
        for path, found in machines.items()
        if not results.differences(found, machine.as_dict(), IDENTITY) and not found["dirty"]
    ]
    if not mine:
        others = sorted({found["device"] for found in machines.values()}) or ["no machine"]
        raise RefusedError(
            f"baseline: no results of {machine.device!r} in {folder}; there are results of "
            f"{', '.join(others)}, and results of different machines are never compared"
        )
    return max(mine, key=lambda path: _age(machines[path]["commit"]))


def _schema(path: Path) -> object:
    import json

    return json.loads(path.read_text()).get("schema")


def _age(commit: str) -> int:
    """When a commit was made; 0 for one that is not in this history."""
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct", commit],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else 0


def check_same_machine(baseline: dict[str, Any], fresh: dict[str, Any]) -> None:
    """Raises:
    RefusedError: when the two were measured on different machines.
    """
    different = results.differences(baseline["machine"], fresh["machine"], IDENTITY)
    if different:
        raise RefusedError(
            "machine: results of different machines are never compared: " + "; ".join(different)
        )


def check_tests(op: str) -> None:
    """Run the op's own tests.

    Raises:
        OpTestsError: with the end of their output.
    """
    path = entries()[op].tests
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise OpTestsError(f"{op}: {path} fails, so its timings mean nothing:\n{tail}")


def relative_time(row: Row) -> float | None:
    """Our 25th percentile as a multiple of something measured in the same run.

    The unit of the row where it has one, else the time its roof allows: a machine that is slower
    today is slower in both.
    """
    ours = results.p25_ms(row, OURS)
    if ours is None:
        return None
    unit = results.p25_ms(row, UNITS[row["device"]])
    return ours / (row["roof_ms"] if unit is None else unit)


def spread(row: Row) -> float:
    """Of our own call and of what it is measured against."""
    names = (OURS, UNITS[row["device"]])
    timings = [row["contestants"].get(name, {}).get("timing") for name in names]
    return sum(Timing(**timing).spread for timing in timings if timing)


def compare(baseline: dict[str, Any], fresh: dict[str, Any]) -> list[Verdict]:
    """A verdict for every row that both hold; the tolerance is the spread of both.

    Raises:
        RefusedError: for different machines, or when no row is in both.
    """
    check_same_machine(baseline, fresh)
    before = {key_of(row): row for row in baseline["rows"]}
    verdicts = []
    for row in fresh["rows"]:
        past = before.get(key_of(row))
        then = None if past is None else relative_time(past)
        if past is None or then is None:
            continue
        now = relative_time(row)
        # An op that worked and no longer does is infinitely slower.
        ratio = float("inf") if now is None else now / then
        tolerance = max(LEAST_TOLERANCE, spread(past) + (0.0 if now is None else spread(row)))
        verdicts.append(Verdict(key_of(row), ratio, tolerance))
    if not verdicts:
        raise RefusedError("rows: the baseline and this run have no row in common")
    return verdicts
