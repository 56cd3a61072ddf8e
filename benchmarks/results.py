"""Result files: one JSON per machine and commit, saved after every row so that runs resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Machine
from benchmarks.registry import OURS, UNITS, Entry, Goal, Pass, Shape
from benchmarks.timing import summarise
from benchmarks.worker import DTYPES, Failed, Ready
from latent_rl import backends

FOLDER = Path(__file__).parent / "results"
SCHEMA = 2
METHOD = (
    "One process per contestant, interleaved rounds in rotating order, an untimed call before each "
    "turn of a short one. Ratios are of 25th percentiles. GPU: device events, cold L2, short calls "
    "from a CUDA graph."
)
# Machines are the same when these agree; versions may differ and are shown.
IDENTITY = ("device", "cores")

Row = dict[str, Any]
Key = tuple[str, str, str, str, int]


@dataclass(frozen=True)
class Point:
    """One row to measure."""

    op: str
    shape: Shape
    which: Pass
    dtype: str
    device: str
    threads: int

    @property
    def key(self) -> Key:
        return self.op, str(self.shape), self.which.value, self.dtype, self.threads

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.device == "cpu" else ""
        return f"{self.op} {self.which.value} {self.shape} {self.dtype}{threads}"


def key_of(row: Row) -> Key:
    sizes = " ".join(f"{symbol}={size}" for symbol, size in row["shape"].items())
    return row["op"], sizes, row["pass"], row["dtype"], row["threads"]


class Results:
    """A result file being filled; ``broken`` tells of rows that could not be measured at all."""

    def __init__(self, path: Path, machine: Machine) -> None:
        self.path = path
        self.broken: list[str] = []
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "machine": machine.as_dict(),
            "method": METHOD,
            "ceilings": {},
            "rows": [],
        }

    def resume(self) -> int:
        """Take over what an earlier run of the same machine and commit saved; how many rows."""
        if not self.path.is_file():
            return 0
        found = load(self.path)
        different = differences(found["machine"], self.data["machine"], (*IDENTITY, "commit"))
        if different or found["machine"]["dirty"] or self.data["machine"]["dirty"]:
            return 0
        self.data["ceilings"], self.data["rows"] = found["ceilings"], found["rows"]
        return len(self.data["rows"])

    def holds(self, point: Point) -> bool:
        return any(key_of(row) == point.key for row in self.data["rows"])

    def add(self, row: Row) -> None:
        self.data["rows"].append(row)
        self.save()

    def save(self) -> None:
        """Write aside, then rename: an interrupted run leaves the last whole file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.data, indent=1) + "\n")
        aside.replace(self.path)


def load(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: when it was written in another form.
    """
    data: dict[str, Any] = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema must be {SCHEMA}, got {data.get('schema')}")
    return data


def differences(a: Mapping[str, Any], b: Mapping[str, Any], fields: tuple[str, ...]) -> list[str]:
    """One line per field in which two machines differ."""
    return [f"{name}: {a[name]!r} against {b[name]!r}" for name in fields if a[name] != b[name]]


def row_of(
    entry: Entry,
    point: Point,
    answers: Mapping[str, Ready | Failed],
    absent: Mapping[str, str],
    samples: Mapping[str, list[float] | Failed],
    ceilings: Mapping[str, Any],
) -> Row:
    """One row of a result file."""
    contestants = {name: {"status": "absent", "reason": why} for name, why in absent.items()}
    for name, answer in answers.items():
        contestants[name] = _contestant(answer, samples.get(name))
        contestants[name] |= {"note": note} if (note := entry.contestant(name).note) else {}
    dtype = DTYPES[point.dtype]
    row: Row = {
        "op": point.op,
        "pass": point.which.value,
        "shape": dict(point.shape.sizes),
        "note": point.shape.note,
        "dtype": point.dtype,
        "device": point.device,
        "threads": point.threads,
        "backend": backend_of(entry, device_of(point), dtype),
        "bytes": entry.bytes_moved(point.shape, dtype, point.which),
        "flops": entry.flops(point.shape, point.which),
        "contestants": contestants,
    }
    row |= rates(row, ceilings)
    goals = point.shape.goals_for(point.device, point.dtype, point.which)
    row["goals"] = [judged(goal, row) for goal in goals]
    return row


def backend_of(entry: Entry, device: torch.device, dtype: torch.dtype) -> str:
    """What serves an entry, part by part where it is no op of its own."""
    if not entry.parts:
        return backends.serving(entry.op, device, dtype)
    return ", ".join(f"{op}={backends.serving(op, device, dtype)}" for op in entry.parts)


def device_of(point: Point) -> torch.device:
    return torch.device(point.device)


def _contestant(answer: Ready | Failed, times: list[float] | Failed | None) -> dict[str, Any]:
    if isinstance(answer, Failed):
        return {"status": "failed", "reason": answer.reason}
    if isinstance(times, Failed):
        return {"status": "failed", "reason": times.reason}
    found: dict[str, Any] = {
        "status": "measured",
        "timing": asdict(summarise(times or [answer.call_ms])),
        "setup_s": answer.setup_s,
    }
    if answer.quality:
        found["quality"] = answer.quality
    if answer.remark:
        found["remark"] = answer.remark
    return found


def p25_ms(row: Row, name: str) -> float | None:
    """A contestant's time, or None where it has none."""
    contestant = row["contestants"].get(name, {})
    return contestant["timing"]["p25_ms"] if contestant.get("status") == "measured" else None


def rates(row: Row, ceilings: Mapping[str, Any]) -> Row:
    """Rates of our own call, its share of the roof, and every time relative to unit and ours."""
    ours, unit = p25_ms(row, OURS), p25_ms(row, UNITS[row["device"]])
    if ours is None:
        return {}
    times = {name: p25_ms(row, name) for name in row["contestants"]}
    roof_ms = 1e3 * max(
        row["bytes"] / (1e9 * ceilings["copy_gb_per_s"]),
        row["flops"] / (1e9 * ceilings["gemm_gflop_per_s"][row["dtype"]]),
    )
    return {
        "gb_per_s": row["bytes"] / ours / 1e6,
        "gflop_per_s": row["flops"] / ours / 1e6,
        "roof_ms": roof_ms,
        "roof_share": roof_ms / ours,
        "speedup": {n: t / ours for n, t in times.items() if t is not None and n != OURS},
        "relative_to_unit": (
            {n: t / unit for n, t in times.items() if t is not None} if unit is not None else {}
        ),
    }


def judged(goal: Goal, row: Row) -> Row:
    """A goal with the value measured and whether it is met; None where it was not measured."""
    value, met = None, None
    ours = p25_ms(row, OURS)
    if goal.at_most_us is not None and ours is not None:
        value = 1e3 * ours
        met = value <= goal.at_most_us
    elif goal.at_most_floor is not None and ours is not None:
        value = ours / row["roof_ms"]
        met = value <= goal.at_most_floor
    elif goal.at_least is not None and (found := _speedup(goal.against, row)) is not None:
        value = 1 / found if goal.against in UNITS.values() else found
        met = found >= goal.at_least
    return {"goal": str(goal), "value": value, "met": met}


def _speedup(against: str, row: Row) -> float | None:
    speedups: dict[str, float] = row.get("speedup", {})
    if against != "every peer":
        return speedups.get(against)
    others = {name: ratio for name, ratio in speedups.items() if name not in UNITS.values()}
    # Rows of our own dispatch table are no peers.
    peers = [ratio for name, ratio in others.items() if not name.startswith(f"{OURS} (")]
    return min(peers, default=None)
