"""Compare a fresh run with the committed baseline of the same machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.registry import entries


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["op"], json.dumps(row["shape"], sort_keys=True), row["dtype"]


def tests_pass(op: str) -> bool:
    """Whether the op's own tests are green: a speed-up of a wrong op is no speed-up."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", entries()[op].tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def compare(fresh: Path, baseline: Path, tolerance: float) -> list[str]:
    """One line per row that got slower than ``tolerance`` times the baseline.

    Raises:
        ValueError: when the two files come from different machines or an op's tests fail.
    """
    new, old = (json.loads(path.read_text()) for path in (fresh, baseline))
    for field in ("device", "threads"):
        if new["machine"][field] != old["machine"][field]:
            raise ValueError(
                f"{field}: runs of different machines are never compared: "
                f"{new['machine'][field]!r} against {old['machine'][field]!r}"
            )
    before = {key_of(row): row for row in old["rows"]}
    for op in sorted({row["op"] for row in new["rows"]}):
        if not tests_pass(op):
            raise ValueError(f"{op}: its tests fail, so its timings mean nothing")
    slower = []
    for row in new["rows"]:
        past = before.get(key_of(row))
        if past is None:
            continue
        ratio = row["timings"]["latent_rl"]["median_ms"] / past["timings"]["latent_rl"]["median_ms"]
        if ratio > tolerance:
            slower.append(f"{row['op']} {row['shape']}: {ratio:.2f}x the baseline's time")
    return slower
