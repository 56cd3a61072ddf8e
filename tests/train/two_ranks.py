"""Run by torchrun in test_two_ranks.py: RL and a stage on two ranks must keep them equal."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from latent_rl.train import (
    Joint,
    LatentGRPOConfig,
    LatentGRPOTrainer,
    StageArguments,
    StageTrainer,
)
from tests.train.tiny_world import prompts, tiny_model, tiny_world

COMMON = {
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
}


def even_tokens(completion_ids, **columns):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def gathered(tensor: Tensor) -> list[Tensor]:
    parts = [torch.zeros_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor)
    return parts


def check_equal(module: nn.Module, what: str) -> None:
    flat = torch.cat([value.flatten().float() for value in module.state_dict().values()])
    first, second = gathered(flat)
    if not torch.equal(first, second):
        raise SystemExit(f"{what}: ranks differ by {(first - second).abs().max()}")


def check_ppo(out: Path) -> None:
    """Value head, beta and reference stay equal although each rank sees its own completions."""
    model, processor = tiny_model(act=0.3)
    args = LatentGRPOConfig(
        output_dir=str(out / "ppo"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        num_iterations=2,
        loss_type="ppo",
        target_kl=1e-4,
        kl_horizon=64,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        **COMMON,
    )
    trainer = LatentGRPOTrainer(model, even_tokens, args, prompts(8), None, processor)
    trainer.train()
    check_equal(model.latent.policy, "ppo policy")
    check_equal(trainer.value_head, "value head")
    check_equal(trainer.reference, "reference")
    if not trainer.value_head.linear.weight.any():
        raise SystemExit("value head: did not move")
    first, second = gathered(torch.tensor([trainer.regularisation.beta]))
    if first != second or first == args.beta:
        raise SystemExit(f"beta: {first.item()} and {second.item()} on the two ranks")
    # Whitened over both ranks: each rank's own advantages need not have mean 0, all together do.
    kept = trainer._replay.keep_mask
    sums = torch.stack([trainer._replay.advantages[kept].sum(), kept.sum()])
    first, second = gathered(sums)
    mean = (first[0] + second[0]) / (first[1] + second[1])
    if mean.abs() > 1e-5 or first[0].abs() < 1e-3:
        raise SystemExit(f"advantages: mean {mean} over ranks, {first[0] / first[1]} on one")


def main(out: Path) -> None:
    model, processor = tiny_model(act=0.3)
    start = model.latent.policy.head.weight.detach().clone()
    args = LatentGRPOConfig(
        output_dir=str(out / "rl"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        num_iterations=2,
        loss_type="dapo",
        **COMMON,
    )
    trainer = LatentGRPOTrainer(model, even_tokens, args, prompts(8), None, processor)
    trainer.train()
    check_equal(model.latent.policy, "policy")
    if torch.equal(start, model.latent.policy.head.weight):
        raise SystemExit("policy: did not move")
    first, second = gathered(trainer._replay.seeds)
    if torch.isin(first, second).any():
        raise SystemExit("ranks sampled with the same seeds")
    check_ppo(out)
    world = tiny_world(act=0.05)
    StageTrainer(
        world.model,
        Joint(1e-3),
        StageArguments(output_dir=str(out / "stage"), per_device_train_batch_size=4, **COMMON),
        world.rows,
        processing_class=world.processor,
    ).train()
    check_equal(world.model.latent, "joint")
    torch.distributed.barrier()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # torch 2.13's gloo threads now and then abort the process during interpreter teardown
    # ("terminate called without an active exception"), after everything checked here is over.
    os._exit(0)
