"""A chrome trace of torch's profiler as phases, the ops in them, and what the device did."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PREFIX = "latent_rl::"
# What a range adds up to, in the order of an iteration. A phase counts without the phases inside
# it; what the optimizer does belongs to the update.
ITERATION, OPTIMIZER = "iteration", "Optimizer.step#"
SHOWN = {
    "prefill": "prefill",
    "decode": "decode",
    "reward": "reward",
    "rollout": "rollout, the rest",
    "update": "update",
    ITERATION: "between the phases",
}
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Span:
    """A stretch of time, in microseconds of the trace's clock."""

    name: str
    begin: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.begin

    def holds(self, moment: float) -> bool:
        return self.begin <= moment < self.end


@dataclass(frozen=True)
class Work(Span):
    """Something the device did; ``launched`` is when the host asked for it."""

    launched: float


@dataclass(frozen=True)
class Trace:
    """One iteration: its phases (the first is the iteration itself), our ops, the device's work."""

    phases: list[Span]
    ops: list[Span]
    work: list[Work]


@dataclass
class PhaseRow:
    """What a phase took. Milliseconds; ``device_ms`` is work launched in it, None on a CPU."""

    name: str
    host_ms: float = 0.0
    device_ms: float | None = None
    ops: dict[str, tuple[int, float]] = field(default_factory=dict)


def read(path: Path) -> Trace:
    """A trace that ``export_chrome_trace`` wrote, gzipped or not.

    Raises:
        ValueError: where it holds no iteration.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return parse(json.load(file)["traceEvents"])


def parse(events: Iterable[Mapping[str, Any]]) -> Trace:
    """The events of a chrome trace.

    Raises:
        ValueError: where they hold no iteration, or several.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    phases = [
        _span(event, _phase_of(event["name"]))
        for event in whole
        if event.get("cat") == "user_annotation" and _phase_of(event["name"])
    ]
    roots = [span for span in phases if span.name == ITERATION]
    if len(roots) != 1:
        raise ValueError(f"trace: expected one range {PREFIX}{ITERATION}, found {len(roots)}")
    root = roots[0]
    launches = {
        event["args"]["correlation"]: float(event["ts"])
        for event in whole
        if event.get("cat") in _LAUNCH and "correlation" in event.get("args", {})
    }
    inside = [span for span in phases if span is not root and root.holds(span.begin)]
    ops = [
        _span(event, event["name"].removeprefix(PREFIX))
        for event in whole
        if event.get("cat") == "cpu_op" and event["name"].startswith(PREFIX)
    ]
    work = [_work(event, launches) for event in whole if event.get("cat") in _DEVICE]
    return Trace(
        phases=[root, *inside],
        ops=[op for op in ops if root.holds(op.begin)],
        work=[one for one in work if root.holds(one.launched)],
    )


def _phase_of(name: str) -> str:
    """The phase that a range of this name stands for, or ""."""
    if name.startswith(OPTIMIZER):
        return "update"
    short = name.removeprefix(PREFIX)
    return short if short != name and short in SHOWN else ""


def _span(event: Mapping[str, Any], name: str) -> Span:
    begin = float(event["ts"])
    return Span(name, begin, begin + float(event["dur"]))


def _work(event: Mapping[str, Any], launches: Mapping[Any, float]) -> Work:
    begin = float(event["ts"])
    # Without a launch on record the device's own clock has to do.
    launched = launches.get(event.get("args", {}).get("correlation"), begin)
    return Work(event["name"], begin, begin + float(event["dur"]), launched)


def innermost(phases: list[Span], moment: float) -> Span:
    """The shortest phase that holds a moment."""
    return min((p for p in phases if p.holds(moment)), key=lambda p: p.length)


def rows_of(trace: Trace) -> list[PhaseRow]:
    """Every phase that occurred, with the calls and host milliseconds of the ops in it."""
    rows = {name: PhaseRow(name) for name in SHOWN}
    for span in trace.phases:
        row = rows[span.name]
        row.host_ms += span.length / 1e3
        outer = [p for p in trace.phases if p is not span and p.holds(span.begin)]
        # Its own time is not that of what holds it.
        enclosing = [p for p in outer if p.end >= span.end]
        if enclosing:
            rows[min(enclosing, key=lambda p: p.length).name].host_ms -= span.length / 1e3
    for op in trace.ops:
        ops = rows[innermost(trace.phases, op.begin).name].ops
        count, spent = ops.get(op.name, (0, 0.0))
        ops[op.name] = count + 1, spent + op.length / 1e3
    if trace.work:
        for row in rows.values():
            row.device_ms = 0.0
        for work in trace.work:
            row = rows[innermost(trace.phases, work.launched).name]
            row.device_ms = (row.device_ms or 0.0) + work.length / 1e3
    occurred = {span.name for span in trace.phases}
    return [row for name, row in rows.items() if name in occurred]


def markdown(rows: list[PhaseRow], machine: Mapping[str, Any], what: str) -> str:
    """A table under a line that says what was recorded where."""
    total = sum(row.host_ms for row in rows)
    lines = [
        f"{what} on {machine['device']}, commit {machine['commit']}"
        f"{'-dirty' if machine['dirty'] else ''}; times under torch's profiler, which adds to "
        "every call. Device time is that of what a phase launched.",
        "",
        "| phase | ms | of the iteration | device ms | ops: calls, ms on the host |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ops = sorted(row.ops.items(), key=lambda item: -item[1][1])
        device = "-" if row.device_ms is None else f"{row.device_ms:.2f}"
        listed = "; ".join(f"{name} {n}, {spent:.2f}" for name, (n, spent) in ops) or "-"
        share = f"{100 * row.host_ms / total:.0f} %"
        lines.append(f"| {SHOWN[row.name]} | {row.host_ms:.2f} | {share} | {device} | {listed} |")
    lines.append(f"| together | {total:.2f} | 100 % | {_device_total(rows)} | |")
    return "\n".join(lines)


def _device_total(rows: list[PhaseRow]) -> str:
    found = [row.device_ms for row in rows if row.device_ms is not None]
    return f"{sum(found):.2f}" if found else "-"


def draw(trace: Trace, path: Path) -> str | None:
    """Three lanes over time: phases, our ops, the device. Returns why there is no picture."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed"
    root = trace.phases[0]
    names = [name for name in SHOWN if any(span.name == name for span in trace.phases)]
    colours = {name: colormaps["tab10"](i) for i, name in enumerate(names)}
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    axes = figure.subplots()
    # Inner phases over the outer ones.
    for span in sorted(trace.phases, key=lambda span: -span.length):
        bar = [((span.begin - root.begin) / 1e3, span.length / 1e3)]
        axes.broken_barh(bar, (2.1, 0.8), color=colours[span.name])
    for lane, spans in ((1.1, trace.ops), (0.1, trace.work)):
        bars = [((span.begin - root.begin) / 1e3, span.length / 1e3) for span in spans]
        axes.broken_barh(bars, (lane, 0.8), color="0.25")
    for name in names:
        axes.broken_barh([(0, 0)], (0, 0), color=colours[name], label=SHOWN[name])
    axes.set_yticks([0.5, 1.5, 2.5], ["device", "our ops", "phases"])
    axes.set_xlim(0, root.length / 1e3)
    axes.set_xlabel("ms")
    axes.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=110)
    return None
