"""Nsight Compute's raw page as kernels with a few numbers each, and as Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# What the raw page calls the numbers we read. The sections of `SECTIONS` bring them; listed once
# more they are collected whatever a version's sections hold.
DURATION = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
MEMORY = "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
COMPUTE = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "barrier",
    "lg_throttle",
    "long_scoreboard",
    "math_pipe_throttle",
    "mio_throttle",
    "not_selected",
    "short_scoreboard",
    "wait",
)
METRICS = (
    *(DURATION, READ, WRITTEN, MEMORY, DRAM, COMPUTE, OCCUPANCY, REGISTERS),
    *(STALL.format(reason) for reason in STALLS),
)
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "Occupancy",
    "WarpStateStats",
    "LaunchStats",
)
# Those that end in _not_issued say the same of some cycles once more.
_STALL = re.compile(
    r"^smsp__average_warps_issue_stalled_(\w+?)(?<!_not_issued)_per_issue_active\.ratio$"
)
# Seconds or bytes per unit, as ncu spells them with `--print-units base` and without.
_UNITS = {
    "s": 1.0, "second": 1.0, "ms": 1e-3, "msecond": 1e-3, "us": 1e-6, "usecond": 1e-6,
    "ns": 1e-9, "nsecond": 1e-9,
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12,
}  # fmt: skip
# Launched before every case, so that kernels are told apart by what stands before them.
MARKER = "spin_kernel"


@dataclass(frozen=True)
class Launch:
    """One profiled launch. Shares are of the peak, 0 to 1; NaN for what was not reported.

    Attributes:
        kernel: its name without namespaces, template and call arguments.
        bytes: read from and written to device memory.
        memory, dram, compute: share of the peak of the busiest memory unit, of DRAM, of the SMs.
        occupancy: active warps over the most an SM can hold.
        stalls: per reason, warps waiting for it per issued instruction.
    """

    kernel: str
    grid: str
    block: str
    seconds: float
    bytes: float
    memory: float
    dram: float
    compute: float
    occupancy: float
    registers: int
    stalls: Mapping[str, float] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds if self.seconds else float("nan")

    def main_stalls(self, count: int = 2) -> list[tuple[str, float]]:
        """What warps wait for most, as shares of all waiting."""
        waiting = {name: value for name, value in self.stalls.items() if name != "selected"}
        total = sum(waiting.values())
        ranked = sorted(waiting.items(), key=lambda item: -item[1])[:count]
        return [(name, value / total) for name, value in ranked if value > 0]


def short_name(name: str) -> str:
    """``void latent_rl::cuda::<unnamed>::_f_kernel<float>(Args)`` -> ``_f_kernel``."""
    # Namespaces may hold parentheses of their own: (anonymous namespace).
    plain = re.sub(r"\(anonymous namespace\)|<unnamed>", "unnamed", name)
    head = re.split(r"[<(]", plain, maxsplit=1)[0]
    return head.split("::")[-1].split()[-1] if head.strip() else name


def parse(text: str) -> list[Launch]:
    """The launches of ``ncu --csv --page raw``, in their order.

    Raises:
        ValueError: where there is no table, or a launch without a duration.
    """
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise ValueError('ncu: expected a raw page in CSV, found no line that begins with "ID"')
    rows = [row for row in csv.reader(io.StringIO("\n".join(lines[begin:]))) if row]
    names, units, *launches = rows
    width = len(names)
    unit_of = dict(zip(names, units, strict=True))
    return [
        _launch(dict(zip(names, row, strict=True)), unit_of)
        for row in launches
        if len(row) == width and row[0].strip()
    ]


def _launch(row: Mapping[str, str], units: Mapping[str, str]) -> Launch:
    def number(metric: str, default: float = float("nan")) -> float:
        value = row.get(metric, "").replace(",", "")
        try:
            found = float(value)
        except ValueError:
            return default
        unit = units.get(metric, "")
        return found / 100 if unit == "%" else found * _UNITS.get(unit, 1.0)

    seconds = number(DURATION)
    if not seconds > 0:
        raise ValueError(
            f"ncu: {row.get('Kernel Name')!r} has no {DURATION}: {row.get(DURATION)!r}"
        )
    stalls = {
        match[1]: number(name, 0.0) for name in row if (match := _STALL.match(name)) is not None
    }
    return Launch(
        kernel=short_name(row["Kernel Name"]),
        grid=row.get("Grid Size", ""),
        block=row.get("Block Size", ""),
        seconds=seconds,
        bytes=number(READ, 0.0) + number(WRITTEN, 0.0),
        memory=number(MEMORY),
        dram=number(DRAM),
        compute=number(COMPUTE),
        occupancy=number(OCCUPANCY),
        registers=int(number(REGISTERS, 0.0)),
        stalls=stalls,
    )


@dataclass(frozen=True)
class Profiled:
    """A launch and the case it belongs to."""

    case: str
    launch: Launch


def by_case(launches: Iterable[Launch], cases: list[str]) -> list[Profiled]:
    """Launches between the n-th marker and the next belong to case n.

    Raises:
        ValueError: where the markers are not as many as the cases.
    """
    found, at = [], -1
    for launch in launches:
        if launch.kernel == MARKER:
            at += 1
        elif 0 <= at < len(cases):
            found.append(Profiled(cases[at], launch))
    if at + 1 != len(cases):
        raise ValueError(f"ncu: expected {len(cases)} markers, one per case, found {at + 1}")
    return found


def slowest(profiled: list[Profiled], top: int) -> list[Profiled]:
    """The longest launch of each kernel, the kernels with the longest ones."""
    longest: dict[str, Profiled] = {}
    for one in profiled:
        known = longest.get(one.launch.kernel)
        if known is None or one.launch.seconds > known.launch.seconds:
            longest[one.launch.kernel] = one
    return sorted(longest.values(), key=lambda one: -one.launch.seconds)[:top]


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.0f} %"


def markdown(chosen: list[Profiled], machine: Mapping[str, Any]) -> str:
    """A table of launches under a line that says where they were measured."""
    lines = [
        f"Measured on {machine['device']} (driver {machine['driver']}, commit {machine['commit']}"
        f"{'-dirty' if machine['dirty'] else ''}) by {machine['ncu']}; clocks not locked, caches "
        "flushed before every pass. Times under a profiler are not the benchmark's.",
        "",
        "| kernel | case | us | DRAM GB/s | of DRAM's peak | memory | SM | occupancy | registers | "
        "warps wait for |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in chosen:
        launch = one.launch
        stalls = ", ".join(f"{n} {_percent(s)}" for n, s in launch.main_stalls())
        cells = [
            f"`{launch.kernel}`",
            one.case,
            f"{1e6 * launch.seconds:.4g}",
            f"{1e-9 * launch.bandwidth:.0f}",
            *(_percent(s) for s in (launch.dram, launch.memory, launch.compute, launch.occupancy)),
            str(launch.registers),
            stalls or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
