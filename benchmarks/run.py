"""Measure ops and peers in one run; print a table, write one JSON file, a plot and a summary."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import results, ring
from benchmarks.machine import describe
from benchmarks.registry import OURS, UNITS, Entry, Shape, entries
from benchmarks.results import Point, Results, Row
from benchmarks.ring import Ring
from benchmarks.worker import DTYPES, Failed, Ready, Task
from latent_rl import backends

Say = Callable[[str], None]
# Processes that may compile at once.
PREHEAT_WORKERS = 8


@dataclass(frozen=True)
class Options:
    """What to measure and how long. None means everything that the registry declares.

    Attributes:
        commit: what is measured, where git cannot tell.
        rows: backends to force as contestants of their own; None: on a GPU every kernel that could
            serve the op, on a CPU none.
        time_limit_s: no row begins later than this; what is missing can be resumed.
    """

    device: str = "cpu"
    ops: list[str] | None = None
    peers: list[str] | None = None
    dtypes: list[str] | None = None
    shapes: list[str] | None = None
    passes: list[str] | None = None
    threads: tuple[int, ...] = (1,)
    rounds: int = 20
    budget_s: float = 5.0
    label: str = ""
    commit: str = ""
    rows: tuple[str, ...] | None = None
    time_limit_s: float = float("inf")

    def check(self) -> None:
        """Refuse what does not exist.

        Raises:
            ValueError: naming the option, what it accepts and what it got.
        """
        known = entries()
        peers = {p.name for entry in known.values() for p in entry.peers}
        passes = {which.value for entry in known.values() for which in entry.passes}
        for option, given, accepted in (
            ("ops", self.ops, set(known)),
            ("peers", self.peers, peers),
            ("dtype", self.dtypes, set(DTYPES)),
            ("pass", self.passes, passes),
            ("device", [self.device], set(UNITS)),
        ):
            if unknown := set(given or ()) - accepted:
                raise ValueError(f"{option}: unknown {sorted(unknown)}; known: {sorted(accepted)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: torch finds no CUDA device")
        if min(self.threads, default=0) < 1:
            raise ValueError(f"threads: expected at least 1, got {self.threads}")


def selected_shapes(entry: Entry, options: Options) -> list[Shape]:
    """Declared shapes by their tag, or a shape of one's own: 100x16x8."""
    if options.shapes is None:
        return list(entry.shapes)
    declared = {shape.tag: shape for shape in entry.shapes}
    symbols = tuple(entry.shapes[0].sizes)
    chosen = []
    for tag in options.shapes:
        if tag in declared:
            chosen.append(replace(declared[tag], dtypes=_anywhere(declared[tag], options)))
        elif len(options.ops or ()) == 1:
            chosen.append(own_shape(entry, symbols, tag, options))
    return chosen


def _anywhere(shape: Shape, options: Options) -> dict[str, tuple[str, ...]]:
    """A shape that was asked for by name runs also where it is not declared."""
    return {options.device: shape.dtypes_on(options.device) or ("float32",)}


def own_shape(entry: Entry, symbols: tuple[str, ...], tag: str, options: Options) -> Shape:
    sizes = tag.split("x")
    if len(sizes) != len(symbols) or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(
            f"shapes: {entry.op} takes {'x'.join(symbols)}, got {tag!r}; declared are "
            f"{[shape.tag for shape in entry.shapes]}"
        )
    given = dict(zip(symbols, map(int, sizes), strict=True))
    return Shape(given, "given on the command line", {options.device: ("float32",)})


def points(options: Options, threads: int) -> Iterator[Point]:
    """Every row the options select, at one number of threads."""
    for name, entry in sorted(entries().items()):
        if options.ops is not None and name not in options.ops:
            continue
        for shape in selected_shapes(entry, options):
            declared = shape.dtypes_on(options.device)
            dtypes = options.dtypes if options.dtypes and declared else declared
            for dtype in dtypes:
                for which in entry.passes:
                    if options.passes is None or which.value in options.passes:
                        yield Point(name, shape, which, dtype, options.device, threads)


def measure(
    point: Point, group: Ring, options: Options, ceilings: dict[str, Any], scratch: Path
) -> Row:
    """One row of the report."""
    entry = entries()[point.op]
    absent: dict[str, str] = {}
    task = Task("", point.op, point.shape, point.which, point.dtype, point.device, scratch)
    always = {OURS, *UNITS.values()}
    tasks: dict[str, Task] = {}
    for peer in entry.contestants():
        if peer.backend:
            if not takes_part(point, peer.backend, options):
                continue
        elif options.peers is not None and peer.name not in always | set(options.peers):
            continue
        reason = peer.why_not(point.device, point.dtype, point.which)
        if reason is None:
            tasks[peer.name] = replace(task, contestant=peer.name)
        elif peer.name not in UNITS.values():
            absent[peer.name] = reason
    if point.device == "cuda":
        # Compilers run on the host: a row's wait is the longest of them, not their sum.
        group.preheat(tasks, PREHEAT_WORKERS)
    answers = {name: group[name].prepare(task) for name, task in tasks.items()}
    ready = {name: a for name, a in answers.items() if isinstance(a, Ready)}
    handles = {name: group[name] for name in ready}
    samples = ring.interleave(handles, ready, rounds=options.rounds, budget_s=options.budget_s)
    for name in ready:
        group[name].release()
    for name in _short_of_memory(answers, samples):
        answers[name], samples[name] = alone(group[name], replace(task, contestant=name), options)
    return results.row_of(entry, point, answers, absent, samples, ceilings)


def takes_part(point: Point, backend: str, options: Options) -> bool:
    """Whether our op runs once more with this row of the dispatch table forced.

    By default on a GPU, where several kernels may serve an op: all but the one that serves anyway
    and the reference.
    """
    device, dtype = torch.device(point.device), DTYPES[point.dtype]
    # Only a search has rows that take some widths alone.
    width = point.shape["D"] if point.op == "nearest_code" else None
    request = backends.Request(device, dtype, width)
    if dict(backends.explain(point.op, request))[backend] is not None:
        return False
    if options.rows is not None:
        return backend in options.rows
    serving = backends.serving(point.op, device, dtype)
    return point.device == "cuda" and backend not in (serving, "reference")


def _short_of_memory(
    answers: dict[str, Ready | Failed], samples: dict[str, list[float] | Failed]
) -> list[str]:
    """Who failed for lack of device memory while its neighbours held some of it."""
    outcomes = {**answers, **{n: s for n, s in samples.items() if isinstance(s, Failed)}}
    return [
        name
        for name, outcome in outcomes.items()
        if isinstance(outcome, Failed) and "OutOfMemory" in outcome.reason
    ]


def alone(
    handle: ring.Process, task: Task, options: Options
) -> tuple[Ready | Failed, list[float] | Failed]:
    """The second chance of a contestant that ran out of memory: the whole device."""
    answer = handle.prepare(task)
    if isinstance(answer, Failed):
        return answer, answer
    name = task.contestant
    times = ring.interleave(
        {name: handle}, {name: answer}, rounds=ring.MIN_ROUNDS, budget_s=options.budget_s
    )
    handle.release()
    return replace(answer, remark="measured alone: out of memory beside the others"), times[name]


def run(
    options: Options,
    path: Path | None,
    say: Say,
    fresh: bool = False,
    plan: list[Point] | None = None,
) -> Results:
    """Measure what is selected and not yet in the result file, saving after every row.

    Args:
        plan: the rows to measure, in place of those that the options select.

    Raises:
        ValueError: for an unknown op, peer, dtype, pass or shape.
    """
    options.check()
    machine = describe(torch.device(options.device), options.label, options.commit)
    path = path or results.FOLDER / f"{machine.slug}-{machine.version}.json"
    done = Results(path, machine)
    if not fresh and (count := done.resume()):
        say(f"resuming {path.name}: {count} rows are there already")
    if plan is None:
        plan = [p for threads in options.threads for p in points(options, threads)]
    if not plan:
        raise ValueError(f"shapes: nothing to measure on {options.device} for these options")
    todo = [point for point in plan if not done.holds(point)]
    deadline = time.monotonic() + options.time_limit_s
    with tempfile.TemporaryDirectory() as scratch:
        for threads in sorted({point.threads for point in todo}):
            mine = [point for point in todo if point.threads == threads]
            if mine:
                _run_group(mine, options, done, Path(scratch), say, deadline)
    return done


def _run_group(
    mine: list[Point], options: Options, done: Results, scratch: Path, say: Say, deadline: float
) -> None:
    """All points of one number of threads, in one ring of processes."""
    threads = mine[0].threads
    with Ring(threads) as group:
        if str(threads) not in done.data["ceilings"]:
            dtypes = tuple(dict.fromkeys(("float32", "bfloat16", *(p.dtype for p in mine))))
            done.data["ceilings"][str(threads)] = group.ceilings(options.device, dtypes)
        ceilings = done.data["ceilings"][str(threads)]
        for index, point in enumerate(mine, 1):
            if time.monotonic() > deadline:
                left = len(mine) - index + 1
                done.broken.append(f"{left} rows: the time limit was reached; run again to resume")
                say(done.broken[-1])
                return
            began = time.monotonic()
            try:
                row = measure(point, group, options, ceilings, scratch)
            except Exception as error:  # noqa: BLE001 - one broken row must not cost the others
                done.broken.append(f"{point}: {type(error).__name__}: {error}")
                say(f"[{index}/{len(mine)}] {done.broken[-1]}")
                continue
            done.add(row)
            ours = results.p25_ms(row, OURS)
            outcome = "failed" if ours is None else f"{ours:.3g} ms"
            took = time.monotonic() - began
            say(f"[{index}/{len(mine)}] {point}: {outcome} (row in {took:.0f} s)")
