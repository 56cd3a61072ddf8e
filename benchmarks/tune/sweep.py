"""The sweep: compile and check many configurations at once, time those that are right alone."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from benchmarks.machine import Machine
from benchmarks.registry import Shape
from benchmarks.ring import Process
from benchmarks.timing import Timing, summarise
from benchmarks.tune.model import Chip
from benchmarks.tune.spaces import TUNABLES, Tunable
from benchmarks.tune.tuner import Trial, Tried, Tuner
from benchmarks.worker import DTYPES, Failed

Say = Callable[[str], None]
# Of the time a shape has, what compiling may take; the rest is for the clock.
COMPILE_SHARE = 0.6
BEST = 5


@dataclass(frozen=True)
class Plan:
    """What is swept, and how long it may take."""

    ops: tuple[str, ...]
    device: str
    budget_s: float
    limit: int
    workers: int
    calls: int = 12
    rounds: int = 4
    trial_limit_s: float = 60.0
    shapes: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None

    def points(self) -> list[tuple[str, Shape, str]]:
        """(op, shape, dtype) of every declared shape, or of the sizes asked for.

        Raises:
            ValueError: for an op without a table, or a size that fits no op.
        """
        if unknown := set(self.ops) - set(TUNABLES):
            raise ValueError(f"ops: {sorted(unknown)} have no table; known: {sorted(TUNABLES)}")
        found = []
        for op in self.ops:
            declared = TUNABLES[op].entry.shapes
            for shape in declared if self.shapes is None else self._own(op):
                dtypes = shape.dtypes_on(self.device) if self.shapes is None else ("float32",)
                found += [(op, shape, dtype) for dtype in self.dtypes or dtypes]
        if not found:
            raise ValueError(f"shapes: {self.ops} declare none on {self.device}")
        return found

    def _own(self, op: str) -> Iterable[Shape]:
        symbols = tuple(TUNABLES[op].entry.shapes[0].sizes)
        for tag in self.shapes or ():
            sizes = [int(size) for size in tag.split("x") if size.isdigit()]
            if len(sizes) != len(symbols):
                raise ValueError(f"shapes: {op} takes {'x'.join(symbols)}, got {tag!r}")
            yield Shape(dict(zip(symbols, sizes, strict=True)))


@dataclass
class Found:
    """One configuration at one point."""

    config: Any
    predicted_us: float
    tried: Tried | None = None
    times: list[float] = field(default_factory=list)

    @property
    def timing(self) -> Timing | None:
        return summarise(self.times) if self.times else None

    def as_dict(self) -> dict[str, Any]:
        timing = self.timing
        return {
            "config": asdict(self.config),
            "predicted_us": self.predicted_us,
            "tried": None if self.tried is None else asdict(self.tried),
            "timing": None if timing is None else asdict(timing),
        }


@dataclass
class Point:
    """A shape of an op in a dtype, swept."""

    op: str
    shape: Shape
    dtype: str
    present: Any
    found: list[Found]

    def ranked(self) -> list[Found]:
        """What was timed, fastest first."""
        timed = [f for f in self.found if f.times]
        return sorted(timed, key=lambda f: statistics.median(f.times))

    def as_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "shape": dict(self.shape.sizes),
            "dtype": self.dtype,
            "present": asdict(self.present),
            "candidates": [f.as_dict() for f in self.found],
        }


class Pool:
    """Processes that try configurations side by side, and one that times them alone."""

    def __init__(self, workers: int, limit_s: float) -> None:
        self._processes = [Process(f"tuner {i}", 1, limit_s, Tuner) for i in range(workers)]
        self.clock = Process("clock", 1, max(limit_s, 120.0), Tuner)

    def __enter__(self) -> Pool:
        for process in (*self._processes, self.clock):
            process.started()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in (*self._processes, self.clock):
            process.stop()

    def try_all(self, trials: list[Trial], deadline: float) -> list[Tried | None]:
        """In order, until the deadline; None for what was not tried."""
        idle: SimpleQueue[Process] = SimpleQueue()
        for process in self._processes:
            idle.put(process)

        def attempt(trial: Trial) -> Tried | None:
            process = idle.get()
            try:
                if time.monotonic() > deadline:
                    return None
                answer = process.ask("trial", trial)
                if isinstance(answer, Failed):
                    return Tried(answer.reason, 0.0)
                if answer.problem and "CUDA error" in answer.problem:
                    # The context is lost, and with it every later call of that process.
                    process.stop()
                    process.started()
                return answer if isinstance(answer, Tried) else None
            finally:
                idle.put(process)

        with ThreadPoolExecutor(max_workers=len(self._processes)) as threads:
            return list(threads.map(attempt, trials))


def sweep(plan: Plan, machine: Machine, path: Path, say: Say) -> list[Point]:
    """Every point within the budget; ``path`` is written after each.

    Raises:
        ValueError: for what the plan cannot name.
        RuntimeError: when what is right cannot be computed.
    """
    todo = plan.points()
    deadline = time.monotonic() + plan.budget_s
    done: list[Point] = []
    with tempfile.TemporaryDirectory() as scratch, Pool(plan.workers, plan.trial_limit_s) as pool:
        for index, (op, shape, dtype) in enumerate(todo):
            now = time.monotonic()
            if now > deadline:
                say(f"{len(todo) - index} points left out: the budget is spent")
                break
            until = now + (deadline - now) / (len(todo) - index)
            point = sweep_point(plan, (op, shape, dtype), pool, Path(scratch), until)
            done.append(point)
            save(done, machine, path)
            say("\n".join(lines_of(point)))
    return done


def candidates(tunable: Tunable, shape: Shape, dtype: torch.dtype, present: Any) -> list[Found]:
    """The table's choice, then what fits the device, likely winners first."""
    chip = Chip()

    def found(config: Any) -> Found:
        work = tunable.work(config, shape, dtype)
        return Found(config, work.predicted_us(chip, dtype.itemsize))

    fitting = [
        found(config)
        for config in tunable.configs(shape, dtype)
        if config != present and tunable.work(config, shape, dtype).fits(chip)
    ]
    # First what there is: whatever happens later, there is something to compare with.
    return [found(present), *sorted(fitting, key=lambda f: f.predicted_us)]


def sweep_point(
    plan: Plan, at: tuple[str, Shape, str], pool: Pool, scratch: Path, until: float
) -> Point:
    op, shape, dtype = at
    tunable, element = TUNABLES[op], DTYPES[dtype]
    present = tunable.present(shape, element, torch.device(plan.device))
    point = Point(op, shape, dtype, present, candidates(tunable, shape, element, present))
    del point.found[plan.limit :]
    trials = [Trial(op, shape, dtype, plan.device, f.config, scratch) for f in point.found]
    if isinstance(failed := pool.clock.ask("truth", trials[0]), Failed):
        raise RuntimeError(f"{op} {shape}: {failed.reason}")
    now = time.monotonic()
    tried = pool.try_all(trials, now + COMPILE_SHARE * (until - now))
    for found, outcome in zip(point.found, tried, strict=True):
        found.tried = outcome
    timeable = [
        (found, trial)
        for found, trial in zip(point.found, trials, strict=True)
        if found.tried is not None and found.tried.problem is None
    ]
    for found, trial in timeable:
        if time.monotonic() < until or found.config == present:
            _time(pool, found, trial, plan.calls)
    finalists = [f.config for f in point.ranked()[:BEST]]
    for _ in range(plan.rounds):
        for found, trial in timeable:
            if found.times and (found.config in finalists or found.config == present):
                _time(pool, found, trial, plan.calls)
    return point


def _time(pool: Pool, found: Found, trial: Trial, calls: int) -> None:
    times = pool.clock.ask("times", trial, calls)
    if isinstance(times, list):
        found.times += times
    else:
        problem = times.reason if isinstance(times, Failed) else times.problem
        found.tried = Tried(f"while timed: {problem}", 0.0)
        found.times = []


def save(points: list[Point], machine: Machine, path: Path) -> None:
    """Write aside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine.as_dict(), "points": [point.as_dict() for point in points]}
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(data, indent=1) + "\n")
    aside.replace(path)


def literal(config: Any) -> str:
    """As it stands in a table: Config(128, 64, 64, 8, 3)."""
    return f"{type(config).__name__}({', '.join(map(str, vars(config).values()))})"


def lines_of(point: Point) -> list[str]:
    """The best, the table's choice among them, what was dropped, and the row to paste."""
    ranked = point.ranked()
    timed, tried = len(ranked), sum(f.tried is not None for f in point.found)
    lines = [f"{point.op} {point.shape} {point.dtype}: {timed} timed of {tried} tried"]
    shown = ranked[:BEST] + [f for f in ranked[BEST:] if f.config == point.present]
    for found in shown:
        timing = found.timing
        if timing is None or found.tried is None:
            continue
        mark = "  <- the table's" if found.config == point.present else ""
        lines.append(
            f"  {literal(found.config):32} {1e3 * timing.median_ms:9.2f} us "
            f"({1e3 * timing.p20_ms:.2f}-{1e3 * timing.p80_ms:.2f}), predicted "
            f"{found.predicted_us:.1f}; {found.tried.registers} registers, "
            f"{found.tried.shared_bytes} B shared{mark}"
        )
    problems: dict[str, int] = {}
    for found in point.found:
        if found.tried is not None and found.tried.problem:
            reason = found.tried.problem
            key = "spills" if reason.startswith("spills") else reason[:80]
            problems[key] = problems.get(key, 0) + 1
    lines += [f"  dropped {count}: {reason}" for reason, count in problems.items()]
    if ranked:
        lines.append(f"  paste: {literal(ranked[0].config)},  # {point.shape} {point.dtype}")
    return lines


def shared_choices(points: list[Point]) -> list[str]:
    """Per op and dtype the one configuration that serves all shapes best, by geometric mean.

    For tables with one row per dtype, whatever the shape.
    """
    lines = []
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.op, point.dtype), []).append(point)
    for (op, dtype), group in groups.items():
        medians = [{f.config: statistics.median(f.times) for f in p.ranked()} for p in group]
        common = set.intersection(*(set(found) for found in medians)) if medians else set()
        if not common or len(group) < 2:
            continue

        def cost(config: Any, medians: list[dict[Any, float]] = medians) -> float:
            ratios = [found[config] / min(found.values()) for found in medians]
            return math.exp(sum(map(math.log, ratios)) / len(ratios))

        best = min(common, key=cost)
        lines.append(
            f"{op} {dtype}, one for all {len(group)} shapes: {literal(best)} "
            f"({cost(best):.3f}x of each shape's own best)"
        )
    return lines
