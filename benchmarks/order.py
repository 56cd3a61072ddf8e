"""Which row of the dispatch table is fastest, per op and shape, and the order that follows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.registry import OURS, entries, row_name
from benchmarks.results import Row, p25_ms
from latent_rl import backends

# Two rows closer than this are as fast as each other: the table's own order then decides.
TIE = 1.03


@dataclass(frozen=True)
class Point:
    """One shape of an op, with the milliseconds of every backend that ran it."""

    where: str
    times: dict[str, float]
    failed: dict[str, str]

    @property
    def fastest(self) -> str:
        return min(self.times, key=lambda name: self.times[name])


@dataclass(frozen=True)
class Order:
    """An op's rows from fastest to slowest, and where a shape disagrees."""

    op: str
    present: tuple[str, ...]
    suggested: tuple[str, ...]
    points: tuple[Point, ...]

    def exceptions(self) -> list[Point]:
        """Shapes at which the first row suggested is not the fastest, beyond a tie."""
        first = self.suggested[0]
        return [
            point
            for point in self.points
            if point.times.get(first, math.inf) > TIE * point.times[point.fastest]
        ]


def point_of(row: Row) -> Point:
    """The backends' times of a row of a result file; ours counts for whoever served it."""
    times, failed = {}, {}
    for name, _ in backends.explain(row["op"]):
        contestant = OURS if name == row["backend"] else row_name(name)
        found = row["contestants"].get(contestant, {"status": "absent"})
        time = p25_ms(row, contestant)
        if time is not None:
            times[name] = time
        elif found["status"] == "failed":
            failed[name] = found["reason"]
    sizes = " ".join(f"{symbol}={size}" for symbol, size in row["shape"].items())
    return Point(f"{row['pass']} {sizes} {row['dtype']}", times, failed)


def order_of(op: str, rows: Iterable[Row]) -> Order | None:
    """The order that a result file's rows of an op suggest; None where nothing was compared.

    Rows are ordered by the geometric mean of their time over the fastest, over the shapes that they
    ran; a row that failed anywhere comes after those that never did.
    """
    points = tuple(p for p in map(point_of, rows) if len(p.times) > 1)
    if not points:
        return None
    present = tuple(name for name, _ in backends.explain(op))
    measured = [name for name in present if any(name in p.times for p in points)]

    def rank(name: str) -> tuple[bool, float]:
        ratios = [p.times[name] / p.times[p.fastest] for p in points if name in p.times]
        broken = any(name in p.failed for p in points)
        return broken, math.exp(sum(map(math.log, ratios)) / len(ratios))

    ranks = {name: rank(name) for name in measured}
    suggested = sorted(measured, key=lambda name: ranks[name])
    # A tie keeps the order there is.
    for _ in suggested:
        for i in range(len(suggested) - 1):
            a, b = suggested[i], suggested[i + 1]
            tied = ranks[a][0] == ranks[b][0] and ranks[b][1] <= TIE * ranks[a][1]
            if tied and present.index(b) < present.index(a):
                suggested[i], suggested[i + 1] = b, a
    return Order(op, present, tuple(suggested), points)


def lines_of(order: Order) -> list[str]:
    """What a reader needs: times, the suggestion, and where it does not hold."""
    kept = [name for name in order.present if name in order.suggested]
    same = "as it stands" if list(order.suggested) == kept else f"now {' > '.join(kept)}"
    lines = [f"{order.op}: {' > '.join(order.suggested)} ({same})"]
    for point in order.points:
        ranked = sorted(point.times.items(), key=lambda item: item[1])
        times = ", ".join(f"{name} {time:.4g} ms" for name, time in ranked)
        failed = "".join(f"; {name} failed: {why}" for name, why in point.failed.items())
        lines.append(f"  {point.where}: {times}{failed}")
    for point in order.exceptions():
        ratio = point.times[point.fastest]
        first = point.times.get(order.suggested[0])
        cost = "did not run" if first is None else f"takes {first / ratio:.2f}x"
        lines.append(
            f"  changes by shape: {point.where}: {point.fastest} is fastest, "
            f"{order.suggested[0]} {cost}"
        )
    return lines


def suggest(data: dict[str, Any]) -> list[Order]:
    """Orders of every op of a result file that ran on more than one backend."""
    known = [name for name, entry in entries().items() if not entry.parts]
    found = (order_of(op, [row for row in data["rows"] if row["op"] == op]) for op in known)
    return [order for order in found if order is not None]
