"""A result file that is saved after every row, so that a run cut short loses at most one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.ceilings import measure_ceilings
from benchmarks.machine import Machine
from benchmarks.results import IDENTITY, differences
from benchmarks.train.scale.clocks import free

RESULTS = Path(__file__).resolve().parents[2] / "results" / "train"
SCHEMA = 1

Row = dict[str, Any]
Measure = Callable[[], Row]


class AbsentError(Exception):
    """A contestant that cannot run here, and why."""


class Record:
    """Rows of one kind of measurement on one machine and commit.

    A row is one contestant on one case: ``case``, ``contestant``, ``status`` ("measured", "absent",
    "out of memory" or "failed"), ``reason`` unless measured, and numbers.
    """

    def __init__(
        self,
        kind: str,
        machine: Machine,
        device: torch.device,
        settings: Row,
        *,
        dtype: torch.dtype,
        folder: Path = RESULTS,
        minutes: float | None = None,
    ) -> None:
        """``minutes`` after which no row is begun; ``folder`` to write to.

        ``dtype`` of the backbone; training runs under autocast where it is not float32.
        """
        self.kind, self.device, self.dtype = kind, device, dtype
        settings = {**settings, "dtype": str(dtype).removeprefix("torch.")}
        name = f"scale-{kind}-{machine.slug}-{settings['size']}.json"
        self.path, self._committed = folder / name, RESULTS / name
        self._ends = None if minutes is None else time.monotonic() + 60 * minutes
        self.left_out = 0
        self.data: Row = {
            "schema": SCHEMA,
            "kind": kind,
            "machine": machine.as_dict(),
            "settings": settings,
            "ceilings": [],
            "rows": [],
        }
        self.console = Console(width=150)

    @property
    def rows(self) -> list[Row]:
        """All rows so far."""
        found: list[Row] = self.data["rows"]
        return found

    @property
    def copy_gb_per_s(self) -> float:
        """The copy bandwidth measured by this very run."""
        return float(self.data["ceilings"][-1]["copy_gb_per_s"])

    @property
    def gemm_gflop_per_s(self) -> float:
        """The rate of a large matrix product in the model's dtype, measured by this very run."""
        rates: dict[str, float] = self.data["ceilings"][-1]["gemm_gflop_per_s"]
        return next(iter(rates.values()))

    def resume(self) -> int:
        """Take over the rows of an earlier run of the same settings, machine and commit.

        Rows of a tree with uncommitted changes are never taken over.
        """
        for path in (self.path, self._committed):
            if not path.is_file():
                continue
            found = json.loads(path.read_text(encoding="utf-8"))
            mine, theirs = self.data["machine"], found.get("machine", {})
            same = (
                found.get("schema") == SCHEMA
                and not differences(theirs, mine, (*IDENTITY, "commit"))
                and not (theirs["dirty"] or mine["dirty"])
                and found["settings"] == self.data["settings"]
            )
            if same:
                # What failed is tried again.
                self.data["rows"] = [row for row in found["rows"] if row["status"] != "failed"]
                self.data["ceilings"] = found["ceilings"]
                return len(self.rows)
        return 0

    @property
    def autocasts(self) -> bool:
        """Whether training runs under autocast."""
        return self.dtype != torch.float32

    def measure_ceilings(self) -> None:
        """Copy bandwidth and matrix rate, now."""
        self.data["ceilings"].append(measure_ceilings(self.device, (self.dtype,)))
        free(self.device)

    def holds(self, case: Row, contestant: str) -> bool:
        """Whether a row is there."""
        return any(r["case"] == case and r["contestant"] == contestant for r in self.rows)

    def find(self, case: Row, contestant: str) -> Row | None:
        """A measured row, or None."""
        for row in self.rows:
            if (row["case"], row["contestant"], row["status"]) == (case, contestant, "measured"):
                return row
        return None

    @property
    def is_late(self) -> bool:
        """Whether the time for new rows is over."""
        return self._ends is not None and time.monotonic() > self._ends

    def add(self, case: Row, contestant: str, measure: Measure) -> None:
        """Measure a row unless it is there or it is late; what goes wrong is part of the row."""
        if self.holds(case, contestant):
            return
        if self.is_late:
            self.left_out += 1
            return
        row: Row = {"case": case, "contestant": contestant, "status": "measured"}
        started = time.perf_counter()
        try:
            row |= measure()
        except AbsentError as why:
            row |= {"status": "absent", "reason": str(why)}
        except torch.OutOfMemoryError as error:
            row |= {"status": "out of memory", "reason": _first_line(error)}
        except Exception as error:  # noqa: BLE001  the other contestants must still be measured
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {_first_line(error)}"}
        free(self.device)
        row["wall_s"] = time.perf_counter() - started
        self.rows.append(row)
        self.save()
        self._tell(row)

    def save(self) -> None:
        """Write aside, then rename: an interrupted run leaves the last whole file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.path)

    def _tell(self, row: Row) -> None:
        case = ", ".join(f"{name} {value}" for name, value in row["case"].items())
        what = row.get("reason") or row.get("summary", "")
        self.console.print(
            f"{case} | {row['contestant']} | {row['status']} {what} ({row['wall_s']:.1f} s)",
            markup=False,
            soft_wrap=True,
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
