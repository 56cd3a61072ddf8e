"""Reward against tokens spent, for every search at test time, on the demo's policy.

``latent-rl demo --out runs/demo`` first; then ``python -m benchmarks.train.test_time_search
runs/demo`` prints a table and writes JSON into ``benchmarks/results/train/``. Methods that choose
by the reward are oracles: they see what is reported. Seconds are one pass each on a machine that
may be busy, given for orientation; tokens are exact.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from latent_rl.demo.evaluate import MAX_NEW_TOKENS
from latent_rl.demo.tasks import TASKS
from latent_rl.demo.tiny_vlm import load_model, load_processor
from latent_rl.eval import Answerer, Interval, Sampling, answer_seeds, bootstrap_interval
from latent_rl.models import LatentActionModel
from latent_rl.rewards import score_rows
from latent_rl.search import SearchContext, search_by_name

RESULTS = Path(__file__).resolve().parents[1] / "results" / "train"
COUNTS = (2, 4, 8, 16, 32)
BLIND = ("best-of-8:logprob", "majority-of-8", "weighted-majority-of-8", "medoid-of-8",
         "tree-of-8:logprob")  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One method: mean reward over prompts, tokens a prompt, seconds for all prompts."""

    method: str
    chosen_by: str
    temperature: float
    reward: Interval
    tokens: float
    seconds: float


def measure(
    answerer: Answerer, method: str, rows: Sequence[Any], rewards: Any, sampling: Sampling
) -> Point:
    """Answer every row once."""
    started = time.perf_counter()
    seeds = answer_seeds(0, "test", range(len(rows)), 1)
    answers = [own[0] for own in answerer.answer(rows, seeds, sampling)]
    seconds = time.perf_counter() - started
    table = score_rows(
        rewards.functions,
        rows,
        [answer.text for answer in answers],
        [answer.tokens for answer in answers],
        weights=rewards.weights,
    )
    if not all(table.keep_mask):
        raise RuntimeError(f"rewards failed: {'; '.join(table.errors)}")
    return Point(
        method,
        str(answerer.details["chosen_by"]),
        sampling.temperature,
        bootstrap_interval(table.rewards),
        sum(answer.cost for answer in answers) / len(answers),
        seconds,
    )


def run(demo: Path, task_name: str, policy: str, prompts: int) -> list[Point]:
    """Every method on held-out prompts of one task."""
    task = TASKS[task_name]
    rows, rewards = task.prompts(demo / "data", "test")[:prompts], task.rewards()
    model = LatentActionModel.from_pretrained(
        demo / "latent" / (task_name if policy == "rl" else "behaviour_cloning"),
        load_model(demo / "base"),
    )
    context = SearchContext(
        model,
        load_processor(demo / "base"),
        reward_funcs=rewards.functions,
        reward_weights=rewards.weights,
    )
    points = []
    for name, method, temperature in methods():
        sampling = Sampling(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS)
        answerer = search_by_name(method, context)
        points.append(measure(answerer, name, rows, rewards, sampling))
    return points


def methods() -> Iterator[tuple[str, str, float]]:
    """(name in the table, name of the search, temperature)."""
    yield "greedy", "best-of-1:logprob", 0.0
    for temperature in (1.0, 0.5):
        yield "one sample", "best-of-1:logprob", temperature
        for count in COUNTS:
            for method in (f"best-of-{count}", f"tree-of-{count}"):
                yield method, method, temperature
    # Rollouts of the likeliest codes: the tree alone decides where to leave them.
    for count in COUNTS:
        yield f"tree-of-{count}", f"tree-of-{count}", 0.0
    for method in BLIND:
        yield method, method, 1.0


def show(points: Sequence[Point], title: str) -> None:
    """The table on the terminal."""
    columns = ("method", "chosen by", "T", "tokens / prompt", "reward", "seconds")
    table = Table(*columns, title=title)
    for point in points:
        table.add_row(
            point.method,
            point.chosen_by,
            f"{point.temperature:g}",
            f"{point.tokens:.0f}",
            str(point.reward),
            f"{point.seconds:.1f}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="directory of a finished demo")
    parser.add_argument("--task", choices=sorted(TASKS), default="role-play")
    parser.add_argument("--policy", choices=("cloned", "rl"), default="cloned")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--label", default="", help="of the machine")
    given = parser.parse_args()
    points = run(given.demo, given.task, given.policy, given.prompts)
    title = f"{given.task}, {given.policy} policy, {given.prompts} prompts, 95 % bootstrap"
    show(points, title)
    machine = describe(torch.device("cpu"), given.label)
    record = {
        "machine": machine.as_dict(),
        "threads": torch.get_num_threads(),
        "task": given.task,
        "policy": given.policy,
        "prompts": given.prompts,
        "points": [dataclasses.asdict(point) for point in points],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"test_time_search-{machine.slug}-{given.task}-{given.policy}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    Console(soft_wrap=True).print(f"wrote {path}", markup=False)


if __name__ == "__main__":
    main()
