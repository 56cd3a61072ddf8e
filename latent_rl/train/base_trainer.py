"""What both trainers share: complete checkpoints, metric averaging, modes and autocast."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from latent_rl.train.checkpointing import (
    discard_incomplete,
    is_complete,
    latest_checkpoint,
    load_model,
    mark_complete,
    save_model,
)
from latent_rl.train.metric_averages import MetricAverages
from latent_rl.train.stateful import StatefulParts

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["BaseTrainer"]


class EpochSampler(Protocol):
    """A sampler whose order depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        ...


class _EpochCallback(TrainerCallback):
    """Tells the trainer's sampler the epoch, also through the wrappers of a resumed, sharded
    loader."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.epoch_sampler is not None:
            self.trainer.epoch_sampler.set_epoch(int(state.epoch or 0))


class _LossWindow(TrainerCallback):
    """A stateful part: the loss summed up since the last log entry, which the Trainer starts at 0
    when it resumes."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer
        self._resumed: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "tr_loss": self.trainer._tr_loss,
            "total_loss": self.trainer._total_loss_scalar,
            "last_logged": self.trainer._globalstep_last_logged,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        self._resumed = state_dict

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The Trainer sets these just before, so they cannot be restored with the rest.
        if self._resumed is not None:
            self.trainer._tr_loss = self._resumed["tr_loss"].to(args.device)
            self.trainer._total_loss_scalar = float(self._resumed["total_loss"])
            self.trainer._globalstep_last_logged = int(self._resumed["last_logged"])
            self._resumed = None


class BaseTrainer(Trainer):
    """A transformers Trainer of a LatentActionModel.

    Checkpoints hold the latent modules (and tuned backbone layers), optimiser, schedule, random
    states and every part of `stateful`; they are marked complete when whole, and only complete ones
    are resumed from.
    """

    def __init__(self, model: LatentActionModel, **arguments: Any) -> None:
        self.averages = MetricAverages()
        self.eval_averages = MetricAverages()
        self.epoch_sampler: EpochSampler | None = None
        self._tr_loss = torch.zeros(())
        self._total_loss_scalar = 0.0
        self._globalstep_last_logged = 0
        self.stateful = StatefulParts()
        super().__init__(model=model, **arguments)
        self.add_callback(_EpochCallback(self))
        loss_window = _LossWindow(self)
        self.add_callback(loss_window)
        self.stateful.add("averages", self.averages, per_rank=True)
        self.stateful.add("loss_window", loss_window, per_rank=True)
        # Our losses are means over a micro-batch; the Trainer divides them by the accumulation
        # steps.
        self.model_accepts_loss_kwargs = False

    @property
    def output_dir(self) -> Path:
        """Where checkpoints go (TrainingArguments fills its default in)."""
        return Path(self.args.output_dir or "trainer_output")

    @property
    def latent_model(self) -> LatentActionModel:
        """The model without the wrappers of distributed training."""
        inner: LatentActionModel = self.accelerator.unwrap_model(self.model)
        return inner

    def resolve_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the directory to resume from: True means the last *complete* checkpoint of
        `output_dir`, or a fresh start if there is none.

        Raises:
            ValueError: a given directory is no complete checkpoint.
        """
        if resume_from_checkpoint is None or resume_from_checkpoint is False:
            return None
        if resume_from_checkpoint is True:
            found = latest_checkpoint(self.output_dir)
            return str(found) if found else None
        if not is_complete(Path(resume_from_checkpoint)):
            raise ValueError(f"{resume_from_checkpoint} is not a complete checkpoint")
        return resume_from_checkpoint

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `Trainer.train`, with `resolve_checkpoint`."""
        return super().train(self.resolve_checkpoint(resume_from_checkpoint), *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averaged metrics of the training steps since the last call."""
        if "loss" in logs:
            logs = {**logs, **self.averages.flush()}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`, with the averaged metrics of the evaluation steps added."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        output = super().evaluation_loop(*args, **kwargs)
        metrics = {} if output.metrics is None else output.metrics
        metrics.update(self.eval_averages.flush(f"{prefix}_"))
        return output

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        directory = Path(output_dir or self.output_dir)
        save_model(self.latent_model, directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(directory))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        directory = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            discard_incomplete(directory)
        # Rotation runs inside the parent's method, before this checkpoint could be marked complete;
        # an older one must not be deleted until then.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.save_only_model:
            self.stateful.save(
                directory, rank=self.args.process_index, world_size=self.args.world_size
            )
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(directory, {"format": 1, "global_step": self.state.global_step})
            self._rotate(run_dir)

    def _rotate(self, run_dir: Path) -> None:
        from transformers.trainer_utils import rotate_checkpoints

        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=False,
        )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        directory = Path(resume_from_checkpoint)
        load_model(self.latent_model, directory)
        self.stateful.load(directory, rank=self.args.process_index, world_size=self.args.world_size)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            load_model(self.latent_model, Path(self.state.best_model_checkpoint))
