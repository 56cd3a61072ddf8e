"""Run by torchrun in test_two_ranks.py: what fails on one rank is raised on both of them."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import torch

from latent_rl.train import InverseWarmup, StageArguments, StageTrainer, base_trainer
from latent_rl.train.agreement import PeerError
from latent_rl.train.checkpointing import CheckpointWriteError, checkpoints, is_complete
from tests.train.tiny_world import tiny_world
from tests.train.two_ranks import COMMON

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}


def trainer_of(out: Path) -> StageTrainer:
    world = tiny_world()
    args = StageArguments(output_dir=str(out), per_device_train_batch_size=4, **{**COMMON, **BEST})
    return StageTrainer(
        world.model, InverseWarmup(), args, world.rows, world.rows[:4], world.processor
    )


def failure_of(trainer: StageTrainer) -> Exception:
    try:
        trainer.train()
    except Exception as error:  # noqa: BLE001  its kind is what is looked at
        return error
    raise SystemExit("nothing was raised")


def expect(error: Exception, kind: type[Exception], text: str) -> None:
    if type(error) is not kind or text not in str(error):
        raise SystemExit(f"expected {kind.__name__} with {text!r}, got {error!r}")


def main(out: Path) -> None:
    check_a_full_disk(out)
    check_a_best_model_that_one_rank_cannot_read(out)


def check_a_full_disk(out: Path) -> None:
    """The first rank, which alone writes the model, finds the disk full at the second step."""
    save = base_trainer.save_model

    def full(model, directory):
        if directory.name == "checkpoint-2":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(model, directory)

    base_trainer.save_model = full
    trainer = trainer_of(out / "full")
    first = trainer.args.process_index == 0
    reason = "No space left" if first else "another process failed to write the model"
    expect(failure_of(trainer), CheckpointWriteError, reason)
    torch.distributed.barrier()
    found = [(path.name, is_complete(path)) for path in checkpoints(out / "full")]
    if found != [("checkpoint-1", True)]:
        raise SystemExit(f"left behind: {found}")
    base_trainer.save_model = save


def check_a_best_model_that_one_rank_cannot_read(out: Path) -> None:
    trainer = trainer_of(out / "unreadable")
    load, first = base_trainer.load_model, trainer.args.process_index == 0

    def unreadable(model, directory):
        if not first:
            raise FileNotFoundError(f"{directory}: not on this machine")
        load(model, directory)

    base_trainer.load_model = unreadable
    kind, reason = (PeerError, "failed to load") if first else (FileNotFoundError, "not on")
    expect(failure_of(trainer), kind, reason)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # see two_ranks.py
