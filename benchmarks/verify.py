"""Measure again and compare with the committed results of the same machine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import ROOT, Machine
from benchmarks.registry import OURS, UNITS, Pass, Shape, entries
from benchmarks.results import IDENTITY, Key, Point, Row, key_of
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


def plan_of(baseline: dict[str, Any], ops: list[str]) -> list[Point]:
    """The rows of a baseline, to be measured again.

    Raises:
        RefusedError: when it holds none of the ops.
    """
    plan = [
        Point(
            row["op"],
            Shape(row["shape"], row["note"]),
            Pass(row["pass"]),
            row["dtype"],
            row["device"],
            row["threads"],
        )
        for row in baseline["rows"]
        if row["op"] in ops
    ]
    if not plan:
        raise RefusedError(f"ops: the baseline holds no row of {ops}")
    return plan


def ratio_of(past: Row, row: Row) -> float | None:
    """Our time over the baseline's; None where the baseline has none.

    With a unit, both are taken relative to it: a machine that is slower today is slower in both.
    Without one only the roofs can tell such a day, less surely: a row is then as slow as the more
    lenient of its plain time and its time relative to the roof.
    """
    then, now = results.p25_ms(past, OURS), results.p25_ms(row, OURS)
    if then is None:
        return None
    if now is None:
        # An op that worked and no longer does.
        return float("inf")
    units = [results.p25_ms(r, UNITS[r["device"]]) for r in (past, row)]
    if units[0] is not None and units[1] is not None:
        return (now / units[1]) / (then / units[0])
    return min(now / then, (now / row["roof_ms"]) / (then / past["roof_ms"]))


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
        ratio = None if past is None else ratio_of(past, row)
        if past is None or ratio is None:
            continue
        tolerance = max(LEAST_TOLERANCE, spread(past) + spread(row))
        verdicts.append(Verdict(key_of(row), ratio, tolerance))
    if not verdicts:
        raise RefusedError("rows: the baseline and this run have no row in common")
    return verdicts
