"""Command line of the benchmarks: ``python -m benchmarks COMMAND``; ``--help`` lists them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import counters as hardware
from benchmarks import ncu, report, results, roofline
from benchmarks import verify as verification
from benchmarks.machine import ROOT, describe
from benchmarks.order import lines_of, suggest
from benchmarks.packages import why_absent
from benchmarks.profile import Target
from benchmarks.profile import profile as profile_target
from benchmarks.registry import OURS, Pass, entries
from benchmarks.results import Point
from benchmarks.run import Options
from benchmarks.run import run as run_points
from latent_rl.backends import OPS, explain

app = typer.Typer(no_args_is_help=True, add_completion=False)

# Five rounds of every contestant give about as many calls as a device's clocks need to settle.
TUNED = ROOT / "runs" / "benchmarks" / "tuned.json"
ORDERS = ROOT / "runs" / "benchmarks" / "order.json"
QUICK_ROUNDS, QUICK_BUDGET_S = 7, 1.0

SLOWER, REFUSED, TESTS_FAIL = 1, 2, 3

Names = Annotated[str, typer.Option(help="comma-separated; all by default")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Label = Annotated[str, typer.Option(help="name of the machine, for the record")]


def split(names: str) -> list[str] | None:
    """Comma-separated names; empty means all."""
    return [name.strip() for name in names.split(",") if name.strip()] or None


def refuse(error: Exception, code: int = REFUSED) -> typer.Exit:
    typer.echo(str(error), err=True)
    return typer.Exit(code)


def wide_console() -> Console:
    """Tables keep their columns in files and pipes, whose width nobody knows."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


@app.command()
def run(
    device: Device = "cpu",
    ops: Names = "",
    peers: Names = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; as declared")] = "",
    shapes: Annotated[str, typer.Option(help="as 8192x2048x128; all declared by default")] = "",
    passes: Annotated[str, typer.Option("--pass", help="forward, forward+backward")] = "",
    threads: Annotated[str, typer.Option(help="comma-separated, on a CPU")] = "1",
    rounds: Annotated[int, typer.Option(min=5)] = 20,
    budget_s: Annotated[float, typer.Option(help="seconds of turns a row may take")] = 5.0,
    quick: Annotated[bool, typer.Option(help="few rounds: the whole suite in minutes")] = False,
    time_limit_s: Annotated[float, typer.Option(help="begin no row later")] = float("inf"),
    output: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    label: Label = "",
    fresh: Annotated[bool, typer.Option(help="measure again what the file holds")] = False,
    summary: Annotated[Path | None, typer.Option(help="Markdown file with the markers")] = None,
    commit: Annotated[str, typer.Option(help="of a tree without its history")] = "",
) -> None:
    """Measure ops against their peers: table, JSON, roofline, summary. Resumes by itself."""
    try:
        if summary is not None:
            report.check_markers(summary, device)
        options = Options(
            device=device,
            ops=split(ops),
            peers=split(peers),
            dtypes=split(dtype),
            shapes=split(shapes),
            passes=split(passes),
            threads=tuple(int(n) for n in threads.split(",")) if device == "cpu" else (1,),
            rounds=QUICK_ROUNDS if quick else rounds,
            budget_s=QUICK_BUDGET_S if quick else budget_s,
            label=label,
            commit=commit,
            time_limit_s=time_limit_s,
        )
        done = run_points(options, output, typer.echo, fresh)
    except ValueError as error:
        raise refuse(error) from error
    if done.data["rows"]:
        present(done.path, summary)
    for line in done.broken:
        typer.echo(f"not measured: {line}", err=True)
    failed = [row for row in done.data["rows"] if row["contestants"][OURS]["status"] != "measured"]
    raise typer.Exit(1 if failed or done.broken else 0)


def present(path: Path, summary: Path | None) -> None:
    """Table, plot and summary of a result file."""
    data = results.load(path)
    wide_console().print(report.table_of(data["rows"], data["machine"]))
    for line in report.absences(data["rows"]):
        typer.echo(f"absent: {line}")
    plot = path.with_suffix(".png")
    problem = roofline.draw(data, plot)
    typer.echo(f"wrote {path}" + (f"; no plot: {problem}" if problem else f" and {plot.name}"))
    if summary is not None:
        inside = plot.is_relative_to(ROOT) and problem is None
        shown = str(plot.relative_to(ROOT)) if inside else ""
        report.write_between(summary, report.markdown(data, shown), data["rows"][0]["device"])
        typer.echo(f"wrote the summary into {summary}")


@app.command("report")
def show(
    path: Annotated[Path, typer.Argument(help="a JSON result file")],
    summary: Annotated[Path | None, typer.Option(help="Markdown file with the markers")] = None,
) -> None:
    """Show a result file again: table, roofline, summary."""
    try:
        present(path, summary)
    except (OSError, ValueError) as error:
        raise refuse(error) from error


@app.command()
def verify(
    device: Device = "cpu",
    ops: Names = "",
    baseline: Annotated[Path | None, typer.Option(help="the newest of this machine")] = None,
    fresh: Annotated[Path | None, typer.Option(help="compare this file, measure nothing")] = None,
    label: Label = "",
    budget_s: Annotated[float, typer.Option(help="seconds of turns a row may take")] = 5.0,
) -> None:
    """Test the ops, measure again, compare with the baseline of the same machine.

    Exit codes: 0 as fast as before, 1 slower, 2 not comparable, 3 an op's tests fail.
    """
    try:
        machine = describe(torch.device(device), label)
        past = results.load(baseline or verification.newest_baseline(machine))
        # Told before anything is measured.
        verification.check_same_machine(past, {"machine": machine.as_dict()})
        chosen = split(ops) or sorted({row["op"] for row in past["rows"]})
        plan = verification.plan_of(past, chosen)
        for op in chosen:
            verification.check_tests(op)
        # Ours and the unit alone: peers have no say in whether we got slower.
        options = Options(
            device=device, ops=chosen, peers=[], rows=(), budget_s=budget_s, label=label
        )
        now = measured_again(options, plan) if fresh is None else results.load(fresh)
        verdicts = verification.compare(past, now)
    except verification.OpTestsError as error:
        raise refuse(error, TESTS_FAIL) from error
    except (OSError, ValueError) as error:
        raise refuse(error) from error
    for verdict in verdicts:
        typer.echo(str(verdict))
    raise typer.Exit(SLOWER if any(verdict.slower for verdict in verdicts) else 0)


def measured_again(options: Options, plan: list[Point]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        return run_points(options, Path(folder) / "fresh.json", typer.echo, plan=plan).data


@app.command("order")
def backend_order(
    device: Device = "cpu",
    ops: Names = "",
    shapes: Annotated[str, typer.Option(help="as 8192x2048x128; all declared by default")] = "",
    source: Annotated[Path | None, typer.Option(help="read this result, measure nothing")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    budget_s: Annotated[float, typer.Option(help="seconds of turns a row may take")] = 1.0,
    time_limit_s: Annotated[float, typer.Option(help="begin no row later")] = float("inf"),
    label: Label = "",
) -> None:
    """Which backend is fastest per op and shape, and the dispatch order it suggests."""
    try:
        if source is not None:
            data = results.load(source)
        else:
            every = {name for op in OPS for name, _ in explain(op)}
            options = Options(
                device=device,
                ops=split(ops) or list(OPS),
                peers=[],
                shapes=split(shapes),
                rounds=QUICK_ROUNDS,
                budget_s=budget_s,
                label=label,
                rows=tuple(sorted(every)),
                time_limit_s=time_limit_s,
            )
            done = run_points(options, output or ORDERS, typer.echo)
            data = done.data
            for line in done.broken:
                typer.echo(f"not measured: {line}", err=True)
    except (OSError, ValueError) as error:
        raise refuse(error) from error
    for found in suggest(data):
        typer.echo("\n".join(lines_of(found)))


@app.command()
def tune(
    ops: Annotated[list[str] | None, typer.Argument(help="all with a table by default")] = None,
    device: Device = "cuda",
    shapes: Annotated[str, typer.Option(help="own sizes, as 40x16x8; all declared")] = "",
    dtype: Annotated[str, typer.Option(help="as declared by default")] = "",
    budget_s: Annotated[float, typer.Option(help="seconds for everything")] = 480.0,
    limit: Annotated[int, typer.Option(min=2, help="configurations per shape")] = 60,
    workers: Annotated[int, typer.Option(min=1, help="that compile at once")] = 12,
    output: Annotated[Path, typer.Option(help="JSON file to write")] = TUNED,
    label: Label = "",
    commit: Annotated[str, typer.Option(help="of a tree without its history")] = "",
) -> None:
    """Sweep the Triton kernels' tiles: the best five, the table's choice, rows to paste."""
    from benchmarks.tune.spaces import TUNABLES
    from benchmarks.tune.sweep import Plan, shared_choices, sweep

    try:
        Options(device=device).check()
        if problem := why_absent("triton"):
            raise ValueError(problem)
        plan = Plan(
            ops=tuple(ops or TUNABLES),
            device=device,
            budget_s=budget_s,
            limit=limit,
            workers=workers,
            # The interpreter's times say nothing: one call shows that all works.
            calls=12 if device == "cuda" else 1,
            rounds=4 if device == "cuda" else 0,
            shapes=tuple(split(shapes) or ()) or None,
            dtypes=tuple(split(dtype) or ()) or None,
        )
        machine = describe(torch.device(device), label, commit)
        points = sweep(plan, machine, output, typer.echo)
    except (ValueError, RuntimeError) as error:
        raise refuse(error) from error
    for line in shared_choices(points):
        typer.echo(line)
    typer.echo(f"wrote {output}")


@app.command()
def profile(
    op: Annotated[str, typer.Argument(help="an op")],
    shape: Annotated[str, typer.Option(help="as 8192x2048x128; the first declared")] = "",
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    which: Annotated[str, typer.Option("--pass", help="forward or forward+backward")] = "forward",
    peer: Annotated[str, typer.Option(help="profile a peer instead")] = OURS,
    repeats: Annotated[int, typer.Option(min=1)] = 10,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    tool: Annotated[str, typer.Option(help="nsys, ncu, torch or commands")] = "",
    out: Annotated[Path, typer.Option(help="folder of the reports")] = Path("runs/profiles"),
) -> None:
    """One op at one shape under nsys, ncu or torch's profiler (the CPU's default)."""
    try:
        options = Options(device=device, ops=[op], dtypes=[dtype], passes=[which])
        options.check()
        known = [p.name for p in entries()[op].contestants()]
        if peer not in known:
            raise ValueError(f"peer: unknown {peer!r}; known: {known}")
        first = next(s.tag for s in entries()[op].shapes if s.dtypes_on(device))
        target = Target(op, shape or first, device, dtype, Pass(which), peer, repeats, threads)
        default = "nsys" if device == "cuda" else "torch"
        code = profile_target(target, tool or default, out, typer.echo)
    except ValueError as error:
        raise refuse(error) from error
    raise typer.Exit(code)


@app.command()
def counters(
    ops: Names = "",
    top: Annotated[int, typer.Option(min=1, help="kernels in the summary")] = 3,
    raw: Annotated[Path | None, typer.Option(help="read this raw page, profile nothing")] = None,
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("runs/profiles"),
    summary: Annotated[Path | None, typer.Option(help="Markdown file with the markers")] = None,
    label: Label = "",
    commit: Annotated[str, typer.Option(help="of a tree without its history")] = "",
    inside: Annotated[bool, typer.Option("--inside", hidden=True)] = False,
) -> None:
    """Hardware counters of every op's kernels at its GPU shapes, the slowest in a table."""
    try:
        chosen = hardware.cases(split(ops))
        if inside:
            hardware.inside(chosen, torch.device("cuda"))
            return
        if summary is not None:
            report.check_markers(summary, "counters")
        text = raw.read_text() if raw else hardware.collect(split(ops), out, typer.echo)
        profiled = ncu.by_case(ncu.parse(text), [str(case) for case in chosen])
    except (OSError, RuntimeError, ValueError) as error:
        raise refuse(error) from error
    machine = hardware.machine_of(label, commit)
    table = ncu.markdown(ncu.slowest(profiled, top), machine)
    path = hardware.default_path(machine) if raw is None else out / "counters.json"
    hardware.save(profiled, machine, path)
    typer.echo(table)
    typer.echo(f"wrote {path}")
    if summary is not None:
        report.write_between(summary, table, "counters")
        typer.echo(f"wrote the table into {summary}")


@app.command()
def timeline(
    device: Device = "cpu",
    prompts: Annotated[int, typer.Option(min=1)] = 8,
    steps: Annotated[int, typer.Option(min=1, help="tokens a completion")] = 64,
    out: Annotated[Path, typer.Option(help="folder of trace and picture")] = Path("runs/profiles"),
    summary: Annotated[Path | None, typer.Option(help="Markdown file with the markers")] = None,
    label: Label = "",
    commit: Annotated[str, typer.Option(help="of a tree without its history")] = "",
) -> None:
    """One RL iteration as a chrome trace, a picture and a table of its phases."""
    # Imported here: the other commands need no trainer.
    from benchmarks import timeline as recording
    from benchmarks import trace as traces

    where, sizes = torch.device(device), recording.Sizes(prompts=prompts, steps=steps)
    try:
        if summary is not None:
            report.check_markers(summary, "timeline")
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"rl-iteration-{device}.json.gz"
        recording.record(sizes, where, path)
        trace = traces.read(path)
    except (OSError, ValueError) as error:
        raise refuse(error) from error
    table = traces.markdown(
        traces.rows_of(trace), describe(where, label, commit).as_dict(), str(sizes)
    )
    plot = path.with_name(f"rl-iteration-{device}.png")
    problem = traces.draw(trace, plot)
    typer.echo(table)
    typer.echo(f"wrote {path}" + (f"; no picture: {problem}" if problem else f" and {plot.name}"))
    if summary is not None:
        report.write_between(summary, table, "timeline")
        typer.echo(f"wrote the table into {summary}")


if __name__ == "__main__":
    app()
