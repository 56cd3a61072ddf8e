"""The roofline of a result file: every row against the roofs measured in the same run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.packages import why_absent
from benchmarks.report import sizes_of
from benchmarks.results import Key, Row, key_of

# One for every op. Distinct for most colour-blind readers too: Okabe and Ito's palette, and a grey.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"),
    "#999999",
)
# In pixels: how far a number may stand from its point, and how much room it needs.
LABEL_RADII, LABEL_SIZE = (13.0, 20.0, 28.0, 37.0, 48.0, 60.0), (14.0, 11.0)
MARKERS = {"forward": "o", "forward+backward": "s"}


def draw(data: dict[str, Any], path: Path) -> str | None:
    """Write the plot; a reason instead where matplotlib is missing or no row was measured."""
    if problem := why_absent("matplotlib"):
        return problem
    rows = [row for row in data["rows"] if "roof_ms" in row]
    if not rows:
        return "no row was measured"
    from matplotlib.figure import Figure

    groups = sorted({row["threads"] for row in rows})
    numbers = _numbers(rows)
    colours = {op: COLOURS[i] for i, op in enumerate(sorted({row["op"] for row in rows}))}
    height = max(6.0, 1.5 + 0.17 * len(numbers))
    figure = Figure(figsize=(6.0 * len(groups) + 5.5, height), dpi=110, layout="constrained")
    widths = [6.0] * len(groups) + [5.5]
    panels = figure.subplots(1, len(groups) + 1, width_ratios=widths)
    for axes, threads in zip(panels, groups, strict=False):
        chosen = [row for row in rows if row["threads"] == threads]
        ceilings = data["ceilings"][str(threads)]
        _roofs(axes, ceilings, chosen)
        _points(axes, chosen, colours)
        on_cpu = chosen[0]["device"] == "cpu"
        axes.set_title(f"{threads} thread{'s' * (threads > 1)}" if on_cpu else "GPU")
    _legend(panels[-1], numbers, colours)
    figure.draw_without_rendering()
    for axes, threads in zip(panels, groups, strict=False):
        _labels(axes, [row for row in rows if row["threads"] == threads], numbers, colours)
    machine = data["machine"]
    figure.suptitle(f"{machine['device']}, commit {machine['commit']}")
    figure.savefig(path)
    return None


def _numbers(rows: list[Row]) -> dict[tuple[str, ...], tuple[int, Row]]:
    """A number per op, shape, pass and dtype, shared by all panels."""
    found: dict[tuple[str, ...], tuple[int, Row]] = {}
    for row in rows:
        found.setdefault(_identity(row), (len(found) + 1, row))
    return found


def _identity(row: Row) -> tuple[str, ...]:
    key: Key = key_of(row)
    return key[:4]


def intensity(row: Row) -> float:
    """Operations per byte that the definition of the op needs."""
    return row["flops"] / row["bytes"]


def _roofs(axes: Any, ceilings: dict[str, Any], rows: list[Row]) -> None:
    low = min(intensity(row) for row in rows) / 2
    high = max(intensity(row) for row in rows) * 4
    bandwidth = ceilings["copy_gb_per_s"]
    for dtype in sorted({row["dtype"] for row in rows}):
        peak = ceilings["gemm_gflop_per_s"][dtype]
        ridge = peak / bandwidth
        xs = [low, min(max(ridge, low), high), high]
        axes.plot(xs, [min(peak, bandwidth * x) for x in xs], color="0.35", linewidth=1.2)
        axes.annotate(
            f"{dtype} product\n{peak:.0f} GFLOP/s",
            (max(ridge, low), min(peak, bandwidth * high)),
            textcoords="offset points",
            xytext=(-8, 0),
            ha="right",
            va="center",
            fontsize=7,
        )
    axes.annotate(
        f"copy {bandwidth:.1f} GB/s",
        (low, bandwidth * low),
        textcoords="offset points",
        xytext=(0, -10),
        fontsize=7,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte the op must move")
    axes.set_ylabel("GFLOP/s (25th percentile of time)")
    axes.grid(True, which="major", linewidth=0.4, color="0.9")


def _points(
    axes: Any,
    rows: list[Row],
    colours: dict[str, str],
) -> None:
    for row in rows:
        colour = colours[row["op"]]
        face = colour if row["dtype"] == "float32" else "white"
        marker = MARKERS[row["pass"]]
        where = (intensity(row), row["gflop_per_s"])
        axes.plot(*where, marker, color=colour, markerfacecolor=face, markersize=5)


def _labels(
    axes: Any,
    rows: list[Row],
    numbers: dict[tuple[str, ...], tuple[int, Row]],
    colours: dict[str, str],
) -> None:
    """Numbers beside their points, each where no other point or number stands."""
    points = [(intensity(row), row["gflop_per_s"]) for row in rows]
    # Pixels; known once the figure has been laid out.
    taken = [tuple(axes.transData.transform(point)) for point in points]
    own = list(taken)
    for row, point, (x, y) in zip(rows, points, own, strict=True):
        offset = _free_place(x, y, taken)
        taken.append((x + offset[0], y + offset[1]))
        far = math.hypot(*offset) > LABEL_RADII[0]
        axes.annotate(
            str(numbers[_identity(row)][0]),
            point,
            textcoords="offset pixels",
            xytext=offset,
            ha="center",
            va="center",
            fontsize=7,
            color=colours[row["op"]],
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.6"} if far else None,
        )


def _free_place(x: float, y: float, taken: list[tuple[float, float]]) -> tuple[float, float]:
    """The nearest offset whose surroundings are free; the last tried where none is."""
    offset = (0.0, 0.0)
    for radius in LABEL_RADII:
        for step in range(12):
            angle = math.pi * step / 6
            offset = (radius * math.cos(angle), radius * math.sin(angle))
            if all(
                abs(x + offset[0] - a) > LABEL_SIZE[0] or abs(y + offset[1] - b) > LABEL_SIZE[1]
                for a, b in taken
            ):
                return offset
    return offset


def _legend(
    axes: Any, numbers: dict[tuple[str, ...], tuple[int, Row]], colours: dict[str, str]
) -> None:
    axes.axis("off")
    step = 1.0 / (len(numbers) + 2)
    axes.text(0, 1, "circle forward, square forward+backward; hollow: 16-bit", fontsize=7, va="top")
    for number, row in numbers.values():
        short = "fwd" if row["pass"] == "forward" else "fwd+bwd"
        axes.text(
            0,
            1 - (number + 0.5) * step,
            f"{number:2d}  {row['op']} {short} {sizes_of(row)} {row['dtype']}",
            fontsize=7,
            color=colours[row["op"]],
            va="top",
        )
