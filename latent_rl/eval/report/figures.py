"""Figures as inline SVG in the page's own text colour, so that they suit light and dark."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from latent_rl.eval.report.history import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "curve_figure", "new_figure", "require_matplotlib", "svg", "usage_figure"]

# Distinct for the colour-blind, and readable on white and on near-black (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Stands for the page's text colour until the SVG is written.
_INK = "#010203"
_MAX_POINTS = 400
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


def new_figure(rows: int, columns: int, *, width: float = 4.0, height: float = 2.7) -> Any:
    """A figure and its axes [rows, columns], drawn without a display or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def svg(figure: Figure) -> Markup:
    """The figure as SVG to stand inside HTML; text stays text, escaped by matplotlib."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Scales with the page instead of keeping its size in points.
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=2)
    return Markup(re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))


def curve_figure(curves: Sequence[Curve]) -> Markup:
    """A panel per curve, four in a row, with its running mean where it is long."""
    from matplotlib import rc_context

    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    with rc_context(_STYLE):
        figure, grid = new_figure(rows, columns)
        for axes, curve in zip(grid.ravel(), curves, strict=False):
            _draw_curve(axes, curve)
        for axes in grid.ravel()[len(curves) :]:
            axes.set_axis_off()
        return svg(figure)


def usage_figure(usages: Sequence[tuple[str, Sequence[int]]]) -> Markup:
    """Share of each code, most used first, a line per (label, counts)."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure, grid = new_figure(1, 1, width=7.0)
        axes = grid[0, 0]
        for colour, (label, counts) in zip(COLOURS * len(usages), usages, strict=False):
            total = sum(counts)
            shares = sorted((count / total for count in counts), reverse=True)
            axes.step(range(1, len(shares) + 1), shares, where="mid", color=colour, label=label)
        axes.set(xlabel="codes, most used first", ylabel="share", ylim=(0, None))
        axes.grid(alpha=0.25)
        axes.legend()
        return svg(figure)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    steps, values = _thinned(curve)
    long = len(values) > 20
    axes.plot(steps, values, color=COLOURS[0], alpha=0.35 if long else 1.0, linewidth=1)
    if long:
        window = max(2, len(values) // 15)
        axes.plot(steps, _running_mean(values, window), color=COLOURS[0], linewidth=1.5)
    axes.set_title(curve.name)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)


def _thinned(curve: Curve) -> tuple[list[float], list[float]]:
    """At most ``_MAX_POINTS`` means of consecutive points, which bounds the page's size."""
    size = -(-len(curve.values) // _MAX_POINTS)
    starts = range(0, len(curve.values), size)
    parts = [(curve.steps[i : i + size], curve.values[i : i + size]) for i in starts]
    return [sum(s) / len(s) for s, _ in parts], [sum(v) / len(v) for _, v in parts]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to ``window - 1`` before it."""
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
