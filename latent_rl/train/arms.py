"""Two arms of one comparison, latent and token level: the same job, settings, budget and logs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from latent_rl.models import LatentActionModel
from latent_rl.rewards import RewardFunction
from latent_rl.train.rl_config import LatentGRPOConfig
from latent_rl.train.rl_trainer import LatentGRPOTrainer
from latent_rl.train.spending import Spending, spending_of
from latent_rl.train.token_trainer import token_trainer

__all__ = [
    "Arm",
    "ArmJob",
    "ArmRun",
    "LatentArm",
    "Sweep",
    "TokenArm",
    "late_reward",
    "run_arm",
    "sweep",
]


@dataclass(frozen=True)
class ArmJob:
    """What every arm is given beside its model.

    Attributes:
        reward_funcs: of the reward protocol; weights are in the settings.
        train_dataset: RL rows with a length.
        processing_class: the model's processor.
        eval_dataset: RL rows, or None.
    """

    reward_funcs: Sequence[RewardFunction]
    train_dataset: Any
    processing_class: Any
    eval_dataset: Any | None = None


class Arm(Protocol):
    """A way to learn the job."""

    @property
    def name(self) -> str:
        """Of the arm in tables and directories."""
        ...

    def trainer(self, job: ArmJob, args: LatentGRPOConfig, callbacks: list[TrainerCallback]) -> Any:
        """A `transformers.Trainer` that logs `reward` and the totals of :class:`Spending`."""
        ...


@dataclass(frozen=True)
class LatentArm:
    """RL of the latent policy.

    Attributes:
        start: makes the model to begin with, or hands over one that is trained in place.
        name: of the arm.
    """

    start: Callable[[], LatentActionModel]
    name: str = "latent"

    def trainer(self, job: ArmJob, args: LatentGRPOConfig, callbacks: list[TrainerCallback]) -> Any:
        """See :class:`Arm`."""
        return LatentGRPOTrainer(
            self.start(),
            list(job.reward_funcs),
            args,
            job.train_dataset,
            job.eval_dataset,
            job.processing_class,
            callbacks=callbacks,
        )


@dataclass(frozen=True)
class TokenArm:
    """RL of the whole model over tokens, by TRL.

    Attributes:
        start: makes the image-text model to begin with, or hands over one.
        name: of the arm.
    """

    start: Callable[[], Any]
    name: str = "token"

    def trainer(self, job: ArmJob, args: LatentGRPOConfig, callbacks: list[TrainerCallback]) -> Any:
        """See :class:`Arm`."""
        return token_trainer(
            self.start(),
            list(job.reward_funcs),
            args,
            job.train_dataset,
            job.eval_dataset,
            job.processing_class,
            callbacks=callbacks,
        )


@dataclass(frozen=True)
class ArmRun:
    """What an arm did.

    Attributes:
        arm: its name.
        learning_rate, seed: of the run.
        curve: mean reward at every log.
        spending: totals.
        history: the trainer's whole log.
    """

    arm: str
    learning_rate: float
    seed: int
    curve: tuple[float, ...]
    spending: Spending
    history: tuple[Mapping[str, Any], ...] = field(repr=False, default=())


def run_arm(
    arm: Arm,
    job: ArmJob,
    args: LatentGRPOConfig,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    quiet: bool = False,
) -> ArmRun:
    """Train one arm.

    Args:
        arm: which.
        job: rewards, rows and processor.
        args: the same object for every arm of a comparison, `output_dir` excepted.
        callbacks: of the trainer.
        resume: continue from the last checkpoint in `args.output_dir`, if there is one.
        quiet: print nothing.

    Raises:
        ImportError, ValueError: when the arm cannot run under these settings.
    """
    trainer = arm.trainer(job, args, list(callbacks))
    if quiet:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    history = tuple(trainer.state.log_history)
    return ArmRun(
        arm=arm.name,
        learning_rate=args.learning_rate,
        seed=args.seed,
        curve=tuple(float(log["reward"]) for log in history if "reward" in log),
        spending=spending_of(history),
        history=history,
    )


def late_reward(run: ArmRun) -> float:
    """Mean reward over the last quarter of a run's logs.

    Raises:
        ValueError: for a run that ended before its first log.
    """
    if not run.curve:
        raise ValueError(
            f"late_reward: the {run.arm} run of learning rate {run.learning_rate:g} and seed "
            f"{run.seed} has no log with a reward; set logging_steps to fewer than its steps"
        )
    return statistics.fmean(run.curve[-max(1, len(run.curve) // 4) :])


@dataclass(frozen=True)
class Sweep:
    """Every run of a grid; nothing is left out.

    Attributes:
        runs: by arm, learning rate and seed.
        score: by which they are compared, higher is better.
    """

    runs: tuple[ArmRun, ...]
    score: Callable[[ArmRun], float] = late_reward

    def means(self) -> dict[str, dict[float, float]]:
        """Mean score over seeds, by arm and learning rate."""
        scores: dict[str, dict[float, list[float]]] = {}
        for run in self.runs:
            rates = scores.setdefault(run.arm, {})
            rates.setdefault(run.learning_rate, []).append(self.score(run))
        return {
            arm: {rate: statistics.fmean(found) for rate, found in rates.items()}
            for arm, rates in scores.items()
        }

    def best(self) -> dict[str, float]:
        """The learning rate of the best mean score, by arm; the lower one of a tie."""
        return {
            arm: min(rates, key=lambda rate: (-rates[rate], rate))
            for arm, rates in self.means().items()
        }

    def table(self) -> str:
        """All runs as a Markdown table, the best learning rate of each arm marked."""
        best = self.best()
        lines = [
            "| arm | learning rate | seed | score | tokens | rollout s | update s |",
            "|---|---|---|---|---|---|---|",
        ]
        for run in self.runs:
            mark = " (best)" if run.learning_rate == best[run.arm] else ""
            spent = run.spending
            lines.append(
                f"| {run.arm} | {run.learning_rate:g}{mark} | {run.seed} | {self.score(run):.4f} "
                f"| {spent.generated_tokens} | {spent.rollout_seconds:.1f} "
                f"| {spent.update_seconds:.1f} |"
            )
        return "\n".join(lines)


def sweep(
    arms: Sequence[Arm],
    job: ArmJob,
    args: LatentGRPOConfig,
    *,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    score: Callable[[ArmRun], float] = late_reward,
    quiet: bool = True,
) -> Sweep:
    """Tune every arm over the same learning rates and seeds.

    Args:
        arms: whose `start` makes a fresh model for each run.
        job: the same for all.
        args: everything but learning rate, seed and directory; runs go below `output_dir`.
        learning_rates, seeds: the grid.
        score: of a run.
        quiet: print nothing.

    Raises:
        ValueError: for an empty grid, or two arms of one name.
    """
    if not (arms and learning_rates and seeds):
        raise ValueError("sweep: arms, learning_rates and seeds must not be empty")
    if len({arm.name for arm in arms}) < len(arms):
        raise ValueError(f"sweep: arms must have different names, got {[a.name for a in arms]}")
    root = Path(args.output_dir or "trainer_output")
    runs = []
    for arm in arms:
        for rate in learning_rates:
            for seed in seeds:
                out = str(root / arm.name / f"{rate:g}-{seed}")
                own = dataclasses.replace(args, output_dir=out, learning_rate=rate, seed=seed)
                runs.append(run_arm(arm, job, own, quiet=quiet))
    return Sweep(tuple(runs), score)
