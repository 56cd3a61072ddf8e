"""Runs killed with SIGKILL and resumed end in the weights of the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latent_rl.train.checkpointing import checkpoints, is_complete
from tests.train.kill_runs import KILLED, Runs

# Some 35 training runs, each a process: what is tested is that any moment is good enough to die.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """Uninterrupted runs: directory and seconds by kind."""
    made = {}

    def get(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp(kind)
            made[kind] = (out, runs.finish(kind, out))
        return made[kind]

    return get


def numbers(out: Path) -> list[dict]:
    """The log except what is measured."""
    clocks = ("seconds", "runtime", "per_second", "memory_bytes")
    return [
        {name: value for name, value in entry.items() if not name.endswith(clocks)}
        for entry in json.loads((out / "log.json").read_text())
        if "loss" in entry
    ]


def assert_same(out: Path, expected: Path) -> None:
    ours, theirs = load_file(out / "final.safetensors"), load_file(expected / "final.safetensors")
    assert ours.keys() == theirs.keys()
    different = [name for name, value in theirs.items() if not torch.equal(ours[name], value)]
    assert different == []
    assert numbers(out) == numbers(expected)
    assert not list(out.glob(".*")), "something was left behind"
    assert len(checkpoints(out)) == 2


TRAINER = "latent_rl.train.base_trainer"
# Where the run dies: function, number of the call, and when within it.
POINTS = {
    "first-rollout": ("latent_rl.decode.engine:Decoder.generate", 1, "before"),
    "generation-of-the-second-rollout": ("latent_rl.ops:sample_codes", 9, "before"),
    "rewards-of-the-second-rollout": ("__main__:noisy_reward", 2, "after"),
    "middle-of-the-first-rollout": ("torch:Tensor.backward", 9, "after"),
    "middle-of-an-accumulation": ("torch:Tensor.backward", 11, "before"),
    "after-the-optimiser-before-the-schedule": ("torch.optim:AdamW.step", 5, "after"),
    "between-files": (f"{TRAINER}:BaseTrainer._save_optimizer_and_scheduler", 2, "after"),
    "half-an-optimiser": ("torch:save", 4, "half"),
    "between-parts": ("latent_rl.train.stateful:_write", 6, "after"),
    "before-the-mark": (f"{TRAINER}:mark_complete", 2, "before"),
    "half-a-mark": ("latent_rl.train.checkpoint_files:flush", 40, "before"),
    "after-the-mark": (f"{TRAINER}:mark_complete", 2, "after"),
    "rotation-before": (f"{TRAINER}:rotate", 3, "before"),
    "rotation-of-a-mark": ("latent_rl.train.checkpointing:shutil.rmtree", 1, "before"),
    "rotation-half": ("os:unlink", 5, "after"),
    "after-the-last-step": (f"{TRAINER}:rotate", 5, "after"),
}


STAGE_POINTS = {
    "after-k-means": ("latent_rl.train.stage_trainer:StageTrainer._start_anew", 1, "after"),
    "update": ("torch:Tensor.backward", 4, "after"),
    "half-an-optimiser": ("torch:save", 4, "half"),
    "before-the-mark": (f"{TRAINER}:mark_complete", 2, "before"),
}


@pytest.mark.parametrize(
    ("kind", "point"),
    [("rl", point) for point in POINTS.values()]
    + [("stage", point) for point in STAGE_POINTS.values()],
    ids=[*POINTS, *(f"stage-{name}" for name in STAGE_POINTS)],
)
def test_a_killed_run_resumes_exactly(runs, whole, tmp_path, kind, point):
    expected, _ = whole(kind)
    status, _ = runs.ask(kind, tmp_path, point=point)
    assert status == KILLED, runs.errors.read_text()[-3000:]
    left = checkpoints(tmp_path)
    if len(left) > 1:  # there was a complete one, so there still is
        assert any(is_complete(path) for path in left)
    runs.finish(kind, tmp_path)
    assert_same(tmp_path, expected)


def test_a_run_killed_ten_times_at_random_resumes_exactly(runs, whole, tmp_path):
    expected, seconds = whole("rl")
    moments = random.Random(0)
    kills = run = 0
    while kills < 10:
        run += 1
        out, alive = tmp_path / f"run-{run}", True
        while alive and kills < 10:
            status, _ = runs.ask("rl", out, save_steps=1, after=moments.uniform(0, seconds))
            assert status in (0, KILLED), runs.errors.read_text()[-3000:]
            alive = status == KILLED
            kills += alive
        if alive:
            runs.finish("rl", out, save_steps=1)
        assert_same(out, expected)


def test_a_resumed_run_says_which_checkpoints_it_passes_over(runs, whole, tmp_path):
    expected, _ = whole("rl")
    shutil.copytree(expected, tmp_path, dirs_exist_ok=True)
    truncated = tmp_path / "checkpoint-9" / "optimizer.pt"
    size = truncated.stat().st_size
    os.truncate(truncated, 100)
    already = len(runs.errors.read_text())
    runs.finish("rl", tmp_path)
    said = runs.errors.read_text()[already:]
    assert f"passed over: its optimizer.pt has 100 bytes instead of {size}" in said
    assert_same(tmp_path, expected)
