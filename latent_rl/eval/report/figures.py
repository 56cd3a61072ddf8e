"""Figures as inline SVG in the page's own text colour, so that they suit light and dark."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from latent_rl.eval.report.history import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "curve_figure",
    "draw_usage",
    "inline",
    "new_figure",
    "require_matplotlib",
    "running_mean",
    "thinned",
    "usage_figure",
]

# Distinct for the colour-blind, and readable on white and on near-black (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Stands for the page's text colour until the SVG is written.
_INK = "#010203"
_MAX_POINTS = 400
_ID = re.compile(r'(\bid="|href="#|url\(#)')
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": "medium",
    "grid.color": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "latent-rl",
    # Names of metrics may hold dollar signs.
    "text.parse_math": False,
}


def require_matplotlib() -> None:
    """Raise ImportError with what to install, when matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "the report's plots need matplotlib; install it with `pip install 'latent-rl[eval]'`"
        )


def new_figure(
    rows: int, columns: int, *, width: float = 4.0, height: float = 2.7
) -> tuple[Figure, Any]:
    """A figure and its axes [rows, columns], drawn without a display or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def inline(draw: Callable[[], Figure]) -> Markup:
    """What ``draw`` makes as SVG to stand inside HTML; text stays text, escaped by matplotlib."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(_STYLE):
        draw().savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    root, rest = text.split(">", 1)
    # Scales with the page instead of keeping its size in points.
    root = re.sub(r' (?:width|height)="[^"]*"', "", root)
    # Ids are numbered per figure; a page has several.
    mark = hashlib.sha256(rest.encode()).hexdigest()[:8]
    rest = re.sub(r"<[^>]*>", lambda tag: _ID.sub(rf"\1f{mark}-", tag[0]), rest)
    return Markup(f"{root}>{rest}")


def curve_figure(curves: Sequence[Curve]) -> Figure:
    """A panel per curve, three in a row, with its running mean where it is long."""
    columns = min(3, len(curves))
    figure, grid = new_figure(-(-len(curves) // columns), columns)
    for axes, curve in zip(grid.ravel(), curves, strict=False):
        _draw_curve(axes, curve)
    for axes in grid.ravel()[len(curves) :]:
        axes.set_axis_off()
    return figure


def usage_figure(usages: Sequence[tuple[str, Sequence[int]]]) -> Figure:
    """Share of each code, most used first, a line per (label, counts)."""
    figure, grid = new_figure(1, 1, width=7.0)
    draw_usage(grid[0, 0], usages, COLOURS * len(usages))
    return figure


def draw_usage(
    axes: Axes, usages: Sequence[tuple[str, Sequence[int]]], colours: Sequence[str]
) -> None:
    """As :func:`usage_figure`, into axes and in given colours."""
    for colour, (label, counts) in zip(colours, usages, strict=False):
        total = sum(counts)
        shares = sorted((count / total for count in counts), reverse=True)
        axes.step(range(1, len(shares) + 1), shares, where="mid", color=colour, label=label)
    axes.set(xlabel="codes, most used first", ylabel="share", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to ``window - 1`` before it."""
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _draw_curve(axes: Axes, curve: Curve) -> None:
    steps, values = thinned(curve)
    long = len(values) > 20
    axes.plot(steps, values, color=COLOURS[0], alpha=0.35 if long else 1.0, linewidth=1)
    if long:
        window = max(2, len(values) // 15)
        axes.plot(steps, running_mean(values, window), color=COLOURS[0], linewidth=1.5)
    axes.set_title(curve.name)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)


def thinned(curve: Curve) -> tuple[list[float], list[float]]:
    """At most ``_MAX_POINTS`` means of consecutive points, which bounds the page's size."""
    size = -(-len(curve.values) // _MAX_POINTS)
    starts = range(0, len(curve.values), size)
    parts = [(curve.steps[i : i + size], curve.values[i : i + size]) for i in starts]
    return [sum(s) / len(s) for s, _ in parts], [sum(v) / len(v) for _, v in parts]
