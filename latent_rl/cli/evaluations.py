"""Evaluations on disk and on the terminal, for the commands that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from latent_rl.cli.errors import UserError
from latent_rl.eval import Comparison, Evaluation, Interval, SplitSummary, load_evaluation

__all__ = ["DIRECTORY", "comparison_table", "evaluations_in", "metric_table", "named_evaluations"]

DIRECTORY = "evaluations"


def evaluations_in(run: Path) -> dict[str, Evaluation]:
    """A run's evaluations by name, in the order they were made."""
    found = {path.stem: load_evaluation(path) for path in sorted(run.glob(f"{DIRECTORY}/*.json"))}
    return dict(sorted(found.items(), key=lambda item: item[1].created))


def named_evaluations(places: Sequence[Path]) -> dict[str, Evaluation]:
    """Evaluations of files and of runs' directories, with unique names.

    Raises:
        UserError: for a directory without evaluations.
        FileNotFoundError, ValueError: for a file that is missing or no evaluation.
    """
    named: dict[str, Evaluation] = {}
    for place in places:
        if place.is_dir():
            found = {f"{place.name}: {n}": e for n, e in evaluations_in(place.resolve()).items()}
            if not found:
                raise UserError(
                    f"{place}: has no {DIRECTORY}/*.json; run `latent-rl evaluate {place}` first"
                )
        else:
            found = {place.stem: load_evaluation(place)}
        for name, evaluation in found.items():
            label, count = name, 1
            while label in named:
                count += 1
                label = f"{name} ({count})"
            named[label] = evaluation
    return named


def metric_table(title: str, summaries: Mapping[str, SplitSummary]) -> Table:
    """Metrics by split, of one evaluation."""
    table = Table("metric", title=escape(title), title_justify="left")
    for split in summaries:
        table.add_column(escape(split), justify="right")
    names = dict.fromkeys(name for found in summaries.values() for name in found.metrics)
    for name in names:
        cells = [_interval(found.metrics.get(name)) for found in summaries.values()]
        table.add_row(escape(name), *cells)
    if any(found.usage for found in summaries.values()):
        used = [
            f"{found.usage.perplexity:.1f}; {100 * found.usage.share:.0f} %" if found.usage else "-"
            for found in summaries.values()
        ]
        table.add_row("code perplexity; share used", *used)
    return table


def comparison_table(split: str, found: Comparison) -> Table:
    """One split of a comparison: values, and differences to the first run."""
    table = Table("metric", title=escape(split), title_justify="left")
    for name in found.names:
        table.add_column(escape(name), justify="right")
    for row in found.splits[split]:
        cells = [
            _interval(value) + _difference(difference)
            for value, difference in zip(row.values, row.differences, strict=True)
        ]
        table.add_row(escape(row.metric), *cells)
    return table


def _interval(value: Interval | None) -> str:
    if value is None:
        return "-"
    if value.low != value.low:
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f} \\[{value.low:.3f}, {value.high:.3f}]"


def _difference(value: Interval | None) -> str:
    if value is None:
        return ""
    mark = " *" if value.excludes_zero else ""
    ends = "" if value.low != value.low else f" \\[{value.low:+.3f}, {value.high:+.3f}]"
    return f"\n{value.mean:+.3f}{ends}{mark}"
