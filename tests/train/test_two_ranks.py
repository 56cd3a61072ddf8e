"""Two processes on CPU: gradients are synchronised although losses bypass the model's forward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from latent_rl.train.checkpointing import is_complete
from latent_rl.train.forwarding import forward_through

ROOT = Path(__file__).parents[2]


def launch(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_ranks_stay_equal(tmp_path):
    done = launch("tests.train.two_ranks", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_run_whose_rank_was_killed_in_a_checkpoint_resumes_exactly(tmp_path):
    killed = launch("tests.train.two_ranks_killed", str(tmp_path), "kill")
    assert killed.returncode != 0
    run = tmp_path / "killed"
    assert [is_complete(run / f"checkpoint-{step}") for step in (1, 2, 3)] == [True, True, False]
    written = [len(list((run / f"checkpoint-{n}").glob("state-rollout.rank*"))) for n in (2, 3)]
    assert written == [2, 1]
    done = launch("tests.train.two_ranks_killed", str(tmp_path), "resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-3 is no complete checkpoint and is passed over" in done.stderr


@pytest.mark.slow
def test_what_fails_on_one_rank_is_raised_on_both(tmp_path):
    done = launch("tests.train.two_ranks_failing", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


class Wrapper(nn.Module):
    """Stands in for DistributedDataParallel: work happens around the inner forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner
        self.calls = 0

    def forward(self, *args):
        self.calls += 1
        return self.module(*args)


def test_any_function_runs_inside_the_wrapper_s_forward():
    inner = nn.Linear(2, 2)
    wrapped = Wrapper(inner)
    value = torch.ones(1, 2)
    # The function itself may call the inner model: its forward is restored by then.
    result = forward_through(wrapped, inner, lambda: inner(value) + 1)
    torch.testing.assert_close(result, inner(value) + 1)
    assert wrapped.calls == 1
    assert "forward" not in inner.__dict__


def test_forward_is_restored_when_the_wrapper_fails():
    inner = nn.Linear(2, 2)

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        forward_through(Wrapper(inner), inner, fail)
    assert "forward" not in inner.__dict__
