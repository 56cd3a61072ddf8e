"""The two RL arms of the demo: latent actions and TRL's tokens, on the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_rl.demo.evaluate import MAX_NEW_TOKENS
from latent_rl.demo.progress import StepProgress, TrainerProgress
from latent_rl.demo.tasks import TaskRewards
from latent_rl.train import ArmJob, ArmRun, LatentGRPOConfig, run_arm
from latent_rl.train.arms import Arm

__all__ = ["Budget", "DemoJob", "run_demo_arm"]


@dataclass(frozen=True)
class Budget:
    """What both arms may spend: ``steps`` rollouts of ``batch`` answers, ``generations`` a prompt.

    ``latent_rate`` and ``token_rate`` are the best of an equal sweep for each arm, see
    docs/demo.md.
    """

    steps: int
    batch: int = 64
    generations: int = 8
    beta: float = 0.01
    latent_rate: float = 3e-4
    token_rate: float = 2e-4

    @property
    def rollouts(self) -> int:
        """Answers sampled in training."""
        return self.steps * self.batch


@dataclass(frozen=True)
class DemoJob:
    """What an arm is given beside its model; the same for both.

    Attributes:
        processor: the model's. rewards, rows: of the task.
        algorithm: "grpo", "dr_grpo", "dapo" or "bnpo". out: for checkpoints.
    """

    processor: Any
    rewards: TaskRewards
    rows: Sequence[Any]
    budget: Budget
    algorithm: str
    seed: int
    out: Path
    progress: StepProgress

    def arguments(self, rate: float) -> LatentGRPOConfig:
        """Settings of an arm that learns at ``rate``."""
        budget = self.budget
        return LatentGRPOConfig(
            output_dir=str(self.out),
            max_steps=budget.steps,
            per_device_train_batch_size=budget.batch,
            num_generations=budget.generations,
            max_completion_length=MAX_NEW_TOKENS,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=5,
            loss_type=self.algorithm,
            # TRL has none, and it would spend more answers than the other arm has.
            dynamic_sampling=False,
            beta=budget.beta,
            seed=self.seed,
            logging_steps=1,
            save_strategy="steps",
            save_steps=max(1, budget.steps // 3),
            save_total_limit=1,
            reward_weights=list(self.rewards.weights),
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )


def run_demo_arm(arm: Arm, job: DemoJob, rate: float) -> ArmRun:
    """Tune an arm's model in place, from the last checkpoint on."""
    shared = ArmJob(list(job.rewards.functions), job.rows, job.processor)
    return run_arm(
        arm,
        shared,
        job.arguments(rate),
        callbacks=[TrainerProgress(job.progress)],
        resume=True,
        quiet=True,
    )
