"""``python -m benchmarks.train.scale decode | iteration | stages | forecast``.

Each of the first three measures one kind of row, prints it, and writes JSON and a plot into
``benchmarks/results/train/`` (or ``--out``). The file is saved after every row; the same command
on the same commit and machine goes on where it stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.train.scale.decode import DecodeBench, DecodePlanned
from benchmarks.train.scale.forecast import tell
from benchmarks.train.scale.iteration import IterationCase, IterationRun
from benchmarks.train.scale.record import RESULTS, Record
from benchmarks.train.scale.report import REPORTS
from benchmarks.train.scale.sizes import QWEN_3B, SIZES, TINY, ScaleSizes
from benchmarks.train.scale.stages import StagesBench, StagesPlanned

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLANS: dict[str, type[Any]] = {
    "decode": DecodePlanned,
    "iteration": IterationCase,
    "stages": StagesPlanned,
}
# What takes seconds on a CPU; any other size takes the classes' own defaults.
SMALL: dict[str, Any] = {
    "decode": DecodePlanned(
        rows=(4, 1), contexts=(8, 16), group=2, steps=4, loop_steps=4, repeats=2, compile_rows=()
    ),
    "iteration": IterationCase(
        prompts=2, group=4, prompt_tokens=12, steps=6, micro=4, token_micro=4
    ),
    "stages": StagesPlanned(rows=4, length=20, response=8, sft_layers=1, repeats=2),
}


def parser() -> argparse.ArgumentParser:
    """The command line: every field of a plan is an option."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = made.add_subparsers(dest="kind", required=True)
    for kind, plan in PLANS.items():
        own = kinds.add_parser(kind, help=(plan.__doc__ or "").splitlines()[0])
        _add_common(own)
        own.add_argument("--minutes", type=float, default=8.5, help="begin no row after this")
        own.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
        own.add_argument("--fresh", action="store_true", help="measure what is there again")
        own.add_argument("--label", default="", help="name of the machine")
        own.add_argument("--threads", type=int, help="of a CPU")
        own.add_argument(
            "--dtype", choices=sorted(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU"
        )
        for field in fields(plan):
            many = {"nargs": "*"} if isinstance(field.default, tuple) else {}
            own.add_argument(f"--{field.name.replace('_', '-')}", type=int, **many)
    forecast = kinds.add_parser("forecast", help="what they will hold and take, from shapes alone")
    _add_common(forecast)
    forecast.add_argument("--copy-gb-per-s", type=float, default=4300.0)
    forecast.add_argument("--gemm-tflop-per-s", type=float, default=780.0)
    return made


def _add_common(own: argparse.ArgumentParser) -> None:
    own.add_argument("--size", choices=sorted(SIZES), default=QWEN_3B.name)
    own.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def plan_of(args: argparse.Namespace) -> Any:
    """The kind's plan, with what the command line changes."""
    plan = PLANS[args.kind]
    base = SMALL[args.kind] if args.size == TINY.name else plan()
    given = {f.name: getattr(args, f.name) for f in fields(plan)}
    changed = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    return type(base)(**{**asdict(base), **changed})


def measure(kind: str, sizes: ScaleSizes, plan: Any, record: Record) -> None:
    """Every row of a kind that is not there yet."""
    if kind == "decode":
        DecodeBench(sizes, plan, record).measure()
    elif kind == "iteration":
        IterationRun(sizes, plan, record).measure()
    else:
        StagesBench(sizes, plan, record).measure()


def main(arguments: list[str] | None = None) -> Record | None:
    """Measure, print, write, draw; None for a forecast."""
    args = parser().parse_args(arguments)
    sizes, console = SIZES[args.size], Console(width=150)
    if args.kind == "forecast":
        tell(
            sizes,
            console,
            decode=DecodePlanned(),
            case=IterationCase(),
            stages=StagesPlanned(),
            copy_gb_per_s=args.copy_gb_per_s,
            gemm_tflop_per_s=args.gemm_tflop_per_s,
        )
        return None
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    plan = plan_of(args)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    settings = {"size": sizes.name, **asdict(sizes)}
    if device.type == "cpu":
        settings["threads"] = torch.get_num_threads()
    record = Record(
        args.kind, describe(device, args.label), device, settings,
        dtype=dtype, folder=args.out, minutes=args.minutes,
    )  # fmt: skip
    if not args.fresh and (held := record.resume()):
        console.print(f"{held} rows are there already (--fresh measures them again)")
    record.measure_ceilings()
    measure(args.kind, sizes, plan, record)
    report = REPORTS[args.kind]
    console.print(report.table(record))
    record.save()
    console.print(f"wrote {record.path}", markup=False, soft_wrap=True)
    if (plot := report.plot(record)) is not None:
        console.print(f"drew {plot}", markup=False, soft_wrap=True)
    if record.left_out:
        console.print(f"{record.left_out} rows left out for time: run the same command again")
    return record


if __name__ == "__main__":
    main()
