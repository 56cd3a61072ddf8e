"""Run twice by torchrun in test_two_ranks.py: first a rank dies in the middle of a checkpoint, then
both resume and must end where an undisturbed run ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from latent_rl.train import LatentGRPOConfig, LatentGRPOTrainer
from latent_rl.train.stateful import StatefulParts
from tests.train.tiny_world import moved, prompts, snapshot, tiny_model
from tests.train.two_ranks import COMMON, check_equal, even_tokens


def trained(out: Path) -> LatentGRPOTrainer:
    """4 updates, 3 to a rollout: checkpoint 2 lies within one, so each rank keeps its replay."""
    model, processor = tiny_model(act=0.3)
    args = LatentGRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        num_iterations=3,
        loss_type="dapo",
        **{**COMMON, "max_steps": 4, "save_strategy": "steps", "save_steps": 1},
    )
    trainer = LatentGRPOTrainer(model, even_tokens, args, prompts(8), None, processor)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def die_in_a_checkpoint() -> None:
    """The second rank dies with its parts of checkpoint 3 unwritten, the first one's written."""
    save = StatefulParts.save

    def dying(self, directory, *, rank, world_size):
        last = directory.name == "checkpoint-3"
        if not (last and rank == 1):
            save(self, directory, rank=rank, world_size=world_size)
        if last:
            torch.distributed.barrier()  # the first rank has written by now
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    StatefulParts.save = dying


def main(out: Path, mode: str) -> None:
    if mode == "kill":
        die_in_a_checkpoint()
    resumed = trained(out / "killed")
    whole = trained(out / "whole")
    different = moved(snapshot(whole.latent_model), resumed.latent_model)
    if different:
        raise SystemExit(f"the resumed run ended in other weights: {sorted(different)}")
    check_equal(resumed.latent_model.latent.policy, "resumed policy")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    os._exit(0)  # see two_ranks.py
