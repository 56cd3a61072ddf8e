"""The two RL arms: latent actions with our trainer, tokens with TRL's, on the same budget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from latent_rl.data import load_image
from latent_rl.demo.progress import StepProgress, TrainerProgress
from latent_rl.demo.speakers import MAX_NEW_TOKENS
from latent_rl.demo.tasks import TaskRewards
from latent_rl.models import LatentActionModel
from latent_rl.train import LatentGRPOConfig, LatentGRPOTrainer

__all__ = ["ArmJob", "ArmRun", "Budget", "run_latent_arm", "run_token_arm"]


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
class ArmRun:
    """Training reward by step, and where the seconds went."""

    curve: tuple[float, ...]
    rollout_seconds: float
    update_seconds: float


@dataclass(frozen=True)
class ArmJob:
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


def _arguments(job: ArmJob, rate: float) -> dict[str, Any]:
    """What the two trainers' settings have in common: TRL's names, the same values."""
    budget = job.budget
    return {
        "output_dir": str(job.out),
        "max_steps": budget.steps,
        "per_device_train_batch_size": budget.batch,
        "num_generations": budget.generations,
        "max_completion_length": MAX_NEW_TOKENS,
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "loss_type": job.algorithm,
        "beta": budget.beta,
        "temperature": 1.0,
        "seed": job.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": max(1, budget.steps // 3),
        "save_total_limit": 1,
        "reward_weights": list(job.rewards.weights),
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }


def plain_prompts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """RL rows with text contents, which both trainers render alike: image first, then text."""
    plain = []
    for row in rows:
        messages = [
            {
                "role": message["role"],
                "content": "".join(part.get("text") or "" for part in message["content"]),
            }
            for message in row["prompt"]
        ]
        plain.append({**row, "prompt": messages})
    return plain


def run_latent_arm(model: LatentActionModel, job: ArmJob) -> ArmRun:
    """Tune the latent policy in place."""
    trainer = LatentGRPOTrainer(
        model,
        list(job.rewards.functions),
        LatentGRPOConfig(**_arguments(job, job.budget.latent_rate)),
        plain_prompts(job.rows),
        processing_class=job.processor,
        callbacks=[TrainerProgress(job.progress)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=True)
    return _arm_run(trainer.state.log_history)


def run_token_arm(model: Any, job: ArmJob) -> ArmRun:
    """Tune the whole model in place with TRL's own trainer."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
        """TRL's trainer with the seconds of its rollouts and updates in its logs."""

        rollout_seconds = step_seconds = 0.0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            started = time.perf_counter()
            result = super()._generate_and_score_completions(inputs)
            self.rollout_seconds += time.perf_counter() - started
            return result

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = super().training_step(*args, **kwargs)
            self.step_seconds += time.perf_counter() - started
            return result

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "reward" in logs or "loss" in logs:
                update = self.step_seconds - self.rollout_seconds
                logs |= {"rollout_seconds": self.rollout_seconds, "update_seconds": update}
                self.rollout_seconds = self.step_seconds = 0.0
            super().log(logs, start_time)

    data = Dataset.from_list(
        [
            {**row, "images": [load_image(path) for path in row["images"]]}
            for row in plain_prompts(job.rows)
        ]
    )
    trainer = TimedTrainer(
        model,
        list(job.rewards.functions),
        args=GRPOConfig(**_arguments(job, job.budget.token_rate), bf16=False),
        train_dataset=data,
        processing_class=job.processor,
        callbacks=[TrainerProgress(job.progress)],
    )
    trainer.remove_callback(PrinterCallback)
    last_checkpoint: Any = get_last_checkpoint
    resume = last_checkpoint(str(job.out)) if job.out.is_dir() else None
    trainer.train(resume_from_checkpoint=resume)
    return _arm_run(trainer.state.log_history)


def _arm_run(history: Sequence[dict[str, float]]) -> ArmRun:
    """Curve and seconds from a trainer's log, which resuming preserves."""
    logs = [log for log in history if "reward" in log and "rollout_seconds" in log]
    return ArmRun(
        curve=tuple(float(log["reward"]) for log in logs),
        rollout_seconds=sum(float(log["rollout_seconds"]) for log in logs),
        update_seconds=sum(float(log["update_seconds"]) for log in logs),
    )
