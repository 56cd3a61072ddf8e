"""Command line of the benchmarks: ``python -m benchmarks run|verify|profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.profile import profile as profile_ops
from benchmarks.run import run as run_ops
from benchmarks.verify import compare

app = typer.Typer(no_args_is_help=True, add_completion=False)


def split(names: str) -> list[str] | None:
    """Comma-separated names; empty means all."""
    return [name.strip() for name in names.split(",") if name.strip()] or None


@app.command()
def run(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    ops: Annotated[str, typer.Option(help="comma-separated; all by default")] = "",
    peers: Annotated[str, typer.Option(help="comma-separated; all by default")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    rounds: Annotated[int, typer.Option(min=5)] = 50,
    budget_s: Annotated[float, typer.Option(help="seconds a row may take")] = 20.0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    label: Annotated[str, typer.Option(help="name of the machine, for the record")] = "",
) -> None:
    """Measure ops against their peers."""
    try:
        path = run_ops(
            device,
            split(ops),
            split(peers),
            dtype,
            rounds=rounds,
            budget_s=budget_s,
            output=output,
            label=label,
        )
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(f"wrote {path}")


@app.command()
def verify(
    fresh: Annotated[Path, typer.Argument(help="JSON of a new run")],
    baseline: Annotated[Path, typer.Argument(help="committed JSON of the same machine")],
    tolerance: Annotated[float, typer.Option(help="allowed ratio to the baseline")] = 1.15,
) -> None:
    """Refuse a run that is slower than its baseline, or whose tests fail."""
    try:
        slower = compare(fresh, baseline, tolerance)
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    for line in slower:
        typer.echo(line, err=True)
    raise typer.Exit(1 if slower else 0)


@app.command()
def profile(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    ops: Annotated[str, typer.Option(help="comma-separated; all by default")] = "",
    repeats: Annotated[int, typer.Option(min=1)] = 10,
) -> None:
    """Call the ops inside NVTX ranges, to be run under a profiler."""
    profile_ops(device, split(ops), repeats)


if __name__ == "__main__":
    app()
