"""`latent-rl compare` and `latent-rl report`: what evaluations and logs say."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from latent_rl.cli.errors import UserError
from latent_rl.cli.evaluations import comparison_table, evaluations_in, named_evaluations
from latent_rl.eval import Comparison, Interval, compare, load_evaluation
from latent_rl.eval.report import read_histories, write_comparison, write_run_report
from latent_rl.eval.writing import write_json

__all__ = ["run_compare", "run_report"]


def run_compare(places: Sequence[Path], html: Path | None, as_json: Path | None) -> None:
    """Print a table of evaluations with their differences to the first; write pages if asked.

    Raises:
        UserError, ValueError, OSError: naming what is missing or wrong.
    """
    named = named_evaluations(places)
    if len(named) < 2:
        raise UserError(f"compare: needs at least two evaluations, found {', '.join(named)}")
    found = compare(list(named.values()), names=list(named))
    console = Console()
    for split in found.splits:
        console.print(comparison_table(split, found))
    console.print(
        f"below a value: its difference to {found.names[0]} over the prompts both have; "
        "* excludes 0",
        markup=False,
    )
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201
    if html is not None:
        title = " and ".join(found.names)
        write_comparison(html, title=title, found=found, evaluations=list(named.values()))
    if as_json is not None:
        write_json(as_json, _plain(found))


def run_report(run: Path, out: Path | None) -> None:
    """Write a run's report: its evaluations and its training logs.

    Raises:
        UserError, ValueError, OSError, ImportError: naming what is missing or wrong.
    """
    if run.is_file():
        evaluations, histories = {run.stem: load_evaluation(run)}, {}
    elif run.is_dir():
        evaluations, histories = evaluations_in(run), read_histories(run)
    else:
        raise UserError(f"{run}: no such run")
    if not evaluations and not histories:
        raise UserError(
            f"{run}: has neither evaluations nor training logs; run `latent-rl evaluate` first"
        )
    path = out or (run.with_suffix(".html") if run.is_file() else run / "report.html")
    name = run.resolve().name
    write_run_report(path, title=name, evaluations=evaluations, histories=histories)
    Console(soft_wrap=True).print(f"wrote {path}", markup=False)


def _plain(found: Comparison) -> dict[str, Any]:
    """The comparison as plain values; NaN ends become None."""
    return {
        "runs": list(found.names),
        "warnings": list(found.warnings),
        "splits": {
            split: [
                {
                    "metric": row.metric,
                    "values": [_ends(value) for value in row.values],
                    "differences": [_ends(value) for value in row.differences],
                }
                for row in rows
            ]
            for split, rows in found.splits.items()
        },
    }


def _ends(value: Interval | None) -> dict[str, float | None] | None:
    if value is None:
        return None
    return {
        name: end if abs(end) < float("inf") else None
        for name, end in dataclasses.asdict(value).items()
    }
