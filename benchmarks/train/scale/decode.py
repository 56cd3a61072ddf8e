"""The decoding engine at given shapes: tokens per second against the floor and against others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.train.scale.clocks import middle
from benchmarks.train.scale.contestants import DecodeCase, HeldRun, loop_times, loops
from benchmarks.train.scale.floors import step_bytes, step_flops
from benchmarks.train.scale.record import Record, Row
from benchmarks.train.scale.sizes import ScaleSizes, build_model, random_text
from latent_rl.decode import Decoder
from latent_rl.models import LatentActionModel

GRAPH, COMPILED = "engine", "engine, compiled"


@dataclass(frozen=True)
class DecodePlanned:
    """What to measure.

    Attributes:
        rows: B.
        contexts: tokens of the prompts.
        group: completions that share a prompt, where there are so many rows.
        steps: tokens of the engine's timed stretch.
        loop_steps: tokens of the others', which take tens of milliseconds each.
        repeats: stretches.
        compile_rows: B for which the compiled step is measured, prompts shared; none for none.
    """

    rows: tuple[int, ...] = (64, 1, 8, 256)
    contexts: tuple[int, ...] = (512, 2048)
    group: int = 8
    steps: int = 64
    loop_steps: int = 16
    repeats: int = 3
    compile_rows: tuple[int, ...] = (64,)

    def cases(self) -> list[DecodeCase]:
        """Completions that share prompts, and of different prompts."""
        found: list[DecodeCase] = []
        for context in self.contexts:
            for rows in self.rows:
                groups = dict.fromkeys((min(self.group, rows), 1))
                found += [DecodeCase(rows, context, group) for group in groups]
        return found


class DecodeBench:
    """The model and the contestants."""

    def __init__(self, sizes: ScaleSizes, planned: DecodePlanned, record: Record) -> None:
        """Make the model in the record's dtype."""
        self.sizes, self.planned, self.record = sizes, planned, record
        self.device = record.device
        self.model: LatentActionModel = build_model(sizes, self.device, record.dtype)
        self.loops = loops(self.model)

    def measure(self) -> None:
        """Every row that is not there yet: the engine and the loops, then the compiled engine."""
        self._warm_up()
        cases = self.planned.cases()
        for case in cases:
            self.record.add(case.as_dict(), GRAPH, lambda case=case: self._engine(case, False))
            # Loops repeat a prompt for each of its completions: one row serves both kinds.
            if case.group == 1:
                for name in self.loops:
                    self.record.add(
                        case.as_dict(), name, lambda case=case, name=name: self._loop(case, name)
                    )
        for case in cases:
            if case.rows in self.planned.compile_rows and (case.group > 1 or case.rows == 1):
                self.record.add(
                    case.as_dict(), COMPILED, lambda case=case: self._engine(case, True)
                )

    def _warm_up(self) -> None:
        """Libraries load and pick their kernels."""
        inputs = random_text(self.sizes, 1, 16, self.device)
        for loop in self.loops.values():
            loop(inputs, 3)

    def _prompts(self, case: DecodeCase, repeats: int) -> dict[str, Tensor]:
        prompts = random_text(self.sizes, case.prompts, case.context, self.device)
        return {name: value.repeat_interleave(repeats, 0) for name, value in prompts.items()}

    def _engine(self, case: DecodeCase, compiled: bool) -> Row:
        planned = self.planned
        # Every case compiled by itself: a few forms of one step are all that dynamo keeps.
        torch.compiler.reset()
        decoder = Decoder(self.model, slots=case.rows, compile=compiled)
        plan = decoder.plan(
            requests=case.rows,
            prompt_tokens=case.context,
            new_tokens=planned.steps + 2,
            num_generations=case.group,
        )
        held = HeldRun(decoder, self._prompts(case, 1), case, planned.steps)
        first_ms = held.advance(planned.steps)
        stretches = [held.advance(planned.steps) / planned.steps for _ in range(planned.repeats)]
        row = self._row(case, middle(stretches), held.prefill_ms)
        row |= {
            "stretches_ms_per_step": stretches,
            # With captures and compilation, which later calls do not pay.
            "first_stretch_s": first_ms / 1e3,
            "planned_bytes": plan.total_bytes,
            "cache_bytes": plan.cache_bytes,
        }
        if not compiled:
            row["parts_ms"] = held.parts_ms()
        row |= self._floors(case, row["step_ms"])
        row["summary"] = (
            f"{row['step_ms']:.3f} ms/step, {row['tokens_per_s']:.0f} tokens/s, "
            f"{row['floor_share']:.1%} of the floor"
        )
        return row

    def _loop(self, case: DecodeCase, name: str) -> Row:
        inputs, steps = self._prompts(case, case.group), self.planned.loop_steps
        times = loop_times(self.model, lambda: self.loops[name](inputs, steps))
        row = self._row(case, times.step_ms, times.prefill_ms)
        row["summary"] = f"{row['step_ms']:.3f} ms/step, {row['tokens_per_s']:.0f} tokens/s"
        return row

    def _row(self, case: DecodeCase, step_ms: float, prefill_ms: float) -> Row:
        return {
            "step_ms": step_ms,
            "tokens_per_s": 1e3 * case.rows / step_ms,
            "prefill_ms": prefill_ms,
        }

    def _floors(self, case: DecodeCase, step_ms: float) -> Row:
        """Bytes of the stretch's middle step over the copy bandwidth of this run."""
        said = [self.planned.steps // 2] * case.rows
        bytes_ = step_bytes(self.model, [case.context] * case.prompts, said, group=case.group)
        copy = self.record.copy_gb_per_s
        floor_ms = bytes_.floor_ms(copy)
        flops = step_flops(self.model, case.rows)
        return {
            "bytes": {name: getattr(bytes_, name) for name in BYTES},
            "copy_gb_per_s": copy,
            "floor_ms": floor_ms,
            "floor_share": floor_ms / step_ms,
            "floor_by_rows_ms": bytes_.total_by_rows / copy / 1e6,
            "flops": flops,
            "gemm_ms": flops / self.record.gemm_gflop_per_s / 1e6,
        }


BYTES = ("trunk", "policy", "merge", "head", "kv", "kv_by_rows", "weights", "total")


def headings() -> tuple[str, ...]:
    """Of the table."""
    return ("rows", "context", "prompts", "contestant", "ms/step", "tokens/s", "% of floor",
            "trunk / policy / tail ms", "prefill ms", "engine is faster by")  # fmt: skip


def lines(record: Record) -> list[Sequence[str]]:
    """Of the table, row by row; ratios are to the engine with the same (repeated) prompts."""
    found: list[Sequence[str]] = []
    for row in record.rows:
        case = row["case"]
        start = (str(case["rows"]), str(case["context"]), str(case["rows"] // case["group"]))
        if row["status"] != "measured":
            found.append((*start, row["contestant"], row["status"], "", "", "", "", ""))
            continue
        parts = " / ".join(f"{ms:.2f}" for ms in row.get("parts_ms", {}).values())
        share = f"{row['floor_share']:.1%}" if "floor_share" in row else ""
        found.append(
            (
                *start,
                row["contestant"],
                f"{row['step_ms']:.3f}",
                f"{row['tokens_per_s']:.0f}",
                share,
                parts,
                f"{row['prefill_ms']:.1f}",
                _ratio(record, row),
            )
        )
    return found


def _ratio(record: Record, row: Row) -> str:
    ours = record.find(row["case"], GRAPH)
    if ours is None or row["contestant"] == GRAPH:
        return ""
    return f"{row['step_ms'] / ours['step_ms']:.2f}x"


def draw(record: Record, axes: Any) -> None:
    """Milliseconds per step against rows, one plot per context, the floor below."""
    contexts = sorted({row["case"]["context"] for row in record.rows})
    for axis, context in zip(axes, contexts, strict=True):
        kinds: dict[str, list[tuple[int, float]]] = {}
        for row in record.rows:
            case = row["case"]
            if row["status"] != "measured" or case["context"] != context:
                continue
            shared = " (shared prompts)" if case["group"] > 1 else ""
            kinds.setdefault(row["contestant"] + shared, []).append((case["rows"], row["step_ms"]))
            if row["contestant"] == GRAPH:
                point = (case["rows"], row["floor_ms"])
                kinds.setdefault("floor" + shared, []).append(point)
        for name, points in kinds.items():
            rows, values = zip(*sorted(points), strict=True)
            style = "--" if name.startswith("floor") else "-"
            axis.plot(rows, values, style, marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="rows", title=f"context {context}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds per step")
    axes[0].legend(fontsize=7)
