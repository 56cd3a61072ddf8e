"""The decoding engine against ``generate()`` and the paper's loop, on a tiny model on the CPU.

``python -m benchmarks.train.decoding`` prints the table, writes JSON into
``benchmarks/results/train/`` and draws how the cost grows with batch, length and group size.
Contestants take turns; a row is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.train.paper_loop import PaperLoop
from latent_rl.decode import Decoder
from latent_rl.demo.tiny_vlm import TinyVlmSizes, build_model, build_processor
from latent_rl.models import LatentActionModel, LatentConfig

RESULTS = Path(__file__).resolve().parents[1] / "results" / "train"
OURS, COMPILED = "engine", "engine, compiled step"
LATENT, BASE, PAPER = "generate(), latent model", "generate(), base model", "the paper's loop"
QUESTION = "what is written in the picture ? say it in your own words , as a friend would ."


@dataclass(frozen=True)
class Case:
    """``prompts`` images with a question, ``group`` completions each of at most ``steps`` tokens.

    ``natural``: tokens end rows at random steps, as in training; otherwise all say ``steps``.
    """

    prompts: int
    group: int
    steps: int
    natural: bool = False
    words: int = 1

    def __str__(self) -> str:
        ends = "natural ends" if self.natural else "fixed length"
        return f"{self.prompts} x {self.group} rows, {self.steps} tokens, {ends}"


class Bench:
    """The model and the contestants."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = TinyVlmSizes()
        self.processor = build_processor([QUESTION] * 3, sizes)
        backbone = build_model(self.processor, sizes).eval()
        config = LatentConfig(num_codes=48, inverse_layers=1, policy_layers=2, merge_blocks=2)
        self.model = LatentActionModel(backbone, config)
        for block in self.model.latent.merge.blocks:
            torch.nn.init.normal_(block.w_down, std=0.3)
        torch.nn.init.normal_(self.model.latent.policy.head.weight, std=0.3)
        self.model.generation_config.eos_token_id = self.processor.tokenizer.eos_token_id
        self.decoders = {OURS: Decoder(self.model), COMPILED: Decoder(self.model, compile=True)}
        self.paper = PaperLoop(self.model)

    def inputs(self, case: Case, repeats: int) -> dict[str, Tensor]:
        """Prompts, each ``repeats`` times in a row."""
        from PIL import Image

        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (case.prompts, 16, 16, 3), generator=generator)
        rows = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": Image.fromarray(image.byte().numpy())},
                        {"type": "text", "text": " ".join([QUESTION] * case.words)},
                    ],
                }
            ]
            for image in pixels
            for _ in range(repeats)
        ]
        return dict(
            self.processor.apply_chat_template(
                rows, add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt", processor_kwargs={"padding": True},
            )
        )  # fmt: skip

    def ends(self, case: Case) -> list[int]:
        """Tokens that end rows: such that about one token in sixteen does."""
        if not case.natural:
            return [int(self.processor.tokenizer.eos_token_id)]
        out = self.decoders[OURS].generate(
            self.inputs(case, 1), max_new_tokens=case.steps, num_generations=case.group
        )
        counts = out.generation.completion_ids.flatten().bincount()
        order = counts.argsort()
        share = counts[order].cumsum(0) / counts.sum()
        return order[(share < 1 / 16) & (counts[order] > 0)].tolist()

    def contestants(self, case: Case) -> dict[str, Callable[[], Any]]:
        """Calls that make the same completions (but for the paper's and the base model's)."""
        ends, least = self.ends(case), 0 if case.natural else case.steps
        shared, repeated = self.inputs(case, 1), self.inputs(case, case.group)
        seeds = torch.arange(case.prompts * case.group)
        kwargs = {"min_new_tokens": least or None, "eos_token_id": ends}

        def engine(name: str) -> Callable[[], Any]:
            return lambda: self.decoders[name].generate(
                shared, max_new_tokens=case.steps, num_generations=case.group, seed=seeds,
                min_new_tokens=least, eos_token_id=ends,
            ).generation  # fmt: skip

        def latent() -> Any:
            return self.model.generate(
                repeated, max_new_tokens=case.steps, seed=seeds, generation_kwargs=kwargs
            )

        def base() -> Any:
            with self.model.disabled():
                return latent()

        return {
            OURS: engine(OURS),
            COMPILED: engine(COMPILED),
            LATENT: latent,
            BASE: base,
            PAPER: lambda: self.paper(repeated, case.steps, ends if case.natural else []),
        }


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each contestant over interleaved rounds: median, 25th percentile, spread."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {
        name: {
            "median_s": statistics.median(found),
            "p25_s": sorted(found)[len(found) // 4],
            "least_s": min(found),
            "most_s": max(found),
        }
        for name, found in times.items()
    }


def agree(calls: dict[str, Callable[[], Any]]) -> float:
    """Share of rows in which engine and generate() said the same codes and tokens."""
    mine, theirs = calls[OURS](), calls[LATENT]()
    same = (mine.codes == theirs.codes).all(1) & (
        (mine.completion_ids == theirs.completion_ids) | ~mine.completion_mask
    ).all(1)
    return float(same.float().mean())


CASES = (
    Case(8, 8, 32),
    Case(8, 8, 128),
    Case(8, 8, 128, natural=True),
    Case(1, 1, 128),
    Case(8, 8, 64, words=8),
)
GROWTH = {
    "rows": tuple(Case(rows, 1, 32) for rows in (1, 4, 16, 64)),
    "tokens": tuple(Case(4, 4, steps) for steps in (16, 64, 256)),
    "completions per prompt": tuple(Case(4, group, 32) for group in (1, 4, 16)),
    "prompt": tuple(Case(4, 4, 32, words=words) for words in (1, 4, 16)),
}


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled step out")
    parser.add_argument("--no-growth", action="store_true", help="leave the growth plot out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench()
    growth: dict[str, list[dict[str, Any]]] = {}
    rows = [run_case(bench, case, args.rounds, compiled=not args.no_compile) for case in CASES]
    if not args.no_growth:
        for axis, cases in GROWTH.items():
            growth[axis] = [run_case(bench, case, 3, compiled=False) for case in cases]
    machine = describe(torch.device("cpu"))
    Console(width=140).print(table_of(rows))
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = f"decoding-{machine.slug}-{args.threads}t"
    record = {"machine": machine.as_dict(), "threads": args.threads, "rows": rows, "growth": growth}
    (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    if growth:
        draw(growth, RESULTS / f"{stem}.png")


def run_case(bench: Bench, case: Case, rounds: int, *, compiled: bool) -> dict[str, Any]:
    """One row of the table."""
    calls = bench.contestants(case)
    if not compiled:
        calls.pop(COMPILED)
    row = {
        "case": str(case),
        "prompt_tokens": int(bench.inputs(case, 1)["input_ids"].shape[1]),
        "rows_equal_to_generate": agree(calls),
        "mean_length": float(calls[OURS]().completion_mask.sum(1).float().mean()),
        "times": measure(calls, rounds),
    }
    print(row["case"], {n: round(t["median_s"], 3) for n, t in row["times"].items()}, flush=True)
    return row


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Milliseconds of ours, and how many times longer the others take."""
    table = Table(title="time of a rollout; others as multiples of the engine's time")
    for name in ("case", "prompt", "mean length", "equal rows", "engine ms", COMPILED, LATENT,
                 BASE, PAPER):  # fmt: skip
        table.add_column(name)
    for row in rows:
        ours = row["times"][OURS]["median_s"]
        others = [
            f"{row['times'][name]['median_s'] / ours:.2f}" if name in row["times"] else "-"
            for name in (COMPILED, LATENT, BASE, PAPER)
        ]
        table.add_row(
            row["case"],
            str(row["prompt_tokens"]),
            f"{row['mean_length']:.0f}",
            f"{row['rows_equal_to_generate']:.0%}",
            f"{1e3 * ours:.0f}",
            *others,
        )
    return table


def draw(growth: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Cost against rows, tokens, completions per prompt and length of the prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(growth), figsize=(4 * len(growth), 3.4), sharey=True)
    values = {
        "rows": [case.prompts for case in GROWTH["rows"]],
        "tokens": [case.steps for case in GROWTH["tokens"]],
        "completions per prompt": [case.group for case in GROWTH["completions per prompt"]],
        "prompt": [row["prompt_tokens"] for row in growth["prompt"]],
    }
    for axis, (name, rows) in zip(axes, growth.items(), strict=True):
        for contestant in rows[0]["times"]:
            seconds = [row["times"][contestant]["median_s"] for row in rows]
            axis.plot(values[name], seconds, marker="o", label=contestant)
        axis.set(xscale="log", yscale="log", xlabel=name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds per rollout")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
