"""A process that forks a training run per request, for tests that kill runs.

Imports cost seconds, so one process pays for them and every run is a fork of it, made before it has
threads. Requests and answers are lines of JSON on stdin and stdout.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import latent_rl.cli.train  # noqa: F401  the command imports it late; here once for all runs
from latent_rl.cli import run as cli_run
from latent_rl.train import (
    InverseWarmup,
    LatentGRPOConfig,
    LatentGRPOTrainer,
    StageArguments,
    StageTrainer,
)
from tests.train.tiny_world import prompts, tiny_model, tiny_world

COMMON = {
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def noisy_reward(completion_ids, **columns):
    """Draws from every global generator: a resumed run must continue their streams."""
    return [
        sum(token % 2 == 0 for token in ids) / len(ids)
        + 0.1 * (random.random() + np.random.rand() + torch.rand(()).item())
        for ids in completion_ids
    ]


def rl(out: Path, save_steps: int) -> LatentGRPOTrainer:
    """9 updates of 2 micro-batches, 3 to a rollout, 2 rollouts to an epoch."""
    model, processor = tiny_model(act=0.3)
    args = LatentGRPOConfig(
        output_dir=str(out),
        max_steps=9,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_iterations=3,
        num_generations=4,
        max_completion_length=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",  # an update too many would show
        loss_type="dapo",
        max_resample_rounds=1,
        top_k=6,
        **{**COMMON, "save_steps": save_steps},
    )
    return LatentGRPOTrainer(model, noisy_reward, args, prompts(8), None, processor)


def stage(out: Path, save_steps: int) -> StageTrainer:
    """6 updates over an epoch and a half, with k-means before the first."""
    world = tiny_world(rows=16)
    args = StageArguments(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=4,
        **{**COMMON, "save_steps": save_steps},
    )
    return StageTrainer(
        world.model, InverseWarmup(1e-3), args, world.rows, processing_class=world.processor
    )


KINDS: dict[str, Callable[[Path, int], Any]] = {"rl": rl, "stage": stage}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(target: str, number: int, moment: str) -> None:
    """Make the n-th call (from 1) of a function the last: it dies before, half-way or after.

    target: "package.module:name.of.function". Half-way: with half of the file it was to write.
    """
    module, _, name = target.partition(":")
    *owners, attribute = name.split(".")
    owner: Any = sys.modules[module]
    for step in owners:
        owner = getattr(owner, step)
    original = getattr(owner, attribute)
    calls = 0

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        last = calls == number
        if last and moment == "before":
            die()
        try:
            return original(*args, **kwargs)
        finally:
            if last and moment == "half":
                path = Path(args[1])
                os.truncate(path, path.stat().st_size // 2)
            if last:
                die()

    setattr(owner, attribute, wrapped)


def run(request: dict[str, Any]) -> None:
    out = Path(request["out"])
    if request.get("point"):
        arm(*request["point"])
    if request["kind"] == "cli":
        os.chdir(out)
        raise SystemExit(cli_run(request["arguments"]))
    trainer = KINDS[request["kind"]](out, request.get("save_steps", 2))
    trainer.train(resume_from_checkpoint=True)
    weights = {name: value.contiguous() for name, value in trainer.model.state_dict().items()}
    save_file(
        {name: value for name, value in weights.items() if name.startswith("latent.")},
        out / "final.safetensors",
    )
    (out / "log.json").write_text(json.dumps(trainer.state.log_history))


def forked(request: dict[str, Any]) -> int:
    """Run a request in a process of its own, killed after `after` seconds if that is given."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            os.dup2(2, 1)  # stdout carries the answers
            run(request)
            code = 0
        except SystemExit as done:
            code = done.code
        except BaseException:  # noqa: BLE001  a fork must never return into the server's loop
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if request.get("after") is not None:
        signal.sigtimedwait({signal.SIGCHLD}, request["after"])
        os.kill(pid, signal.SIGKILL)  # no effect on one that has ended
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    for line in sys.stdin:
        # A run that ended before its time leaves its signal behind.
        while signal.SIGCHLD in signal.sigpending():
            signal.sigwait({signal.SIGCHLD})
        started = time.perf_counter()
        status = forked(json.loads(line))
        answer = {"status": status, "seconds": time.perf_counter() - started}
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
