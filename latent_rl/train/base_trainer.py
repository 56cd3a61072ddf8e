"""What both trainers share: complete checkpoints, metric averaging, modes and autocast."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from latent_rl.train.agreement import on_all
from latent_rl.train.checkpoint_files import naming
from latent_rl.train.checkpointing import (
    checkpoints,
    clear_frames,
    drop_aside,
    is_complete,
    latest_checkpoint,
    load_model,
    mark_complete,
    put_back,
    recover,
    rotate,
    save_model,
    set_aside,
    what_is_missing,
    write_error,
)
from latent_rl.train.metric_averages import MetricAverages
from latent_rl.train.run_lock import run_lock
from latent_rl.train.stateful import StatefulParts
from latent_rl.train.watched_trainer import WatchedTrainer

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["BaseTrainer"]

logger = logging.getLogger(__name__)

FORMAT = 2


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


class BaseTrainer(WatchedTrainer):
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

    def resolve_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the directory to resume from: True means the last *complete* checkpoint of
        `output_dir`, or a fresh start if there is none; warnings name what is passed over.

        Raises:
            ValueError: a given directory is no complete checkpoint.
        """
        if resume_from_checkpoint is None or resume_from_checkpoint is False:
            return None
        if resume_from_checkpoint is True:
            if self.args.should_save:
                recover(self.output_dir)
            found = latest_checkpoint(self.output_dir)
            return str(found) if found else None
        missing = what_is_missing(Path(resume_from_checkpoint))
        if missing is not None:
            raise ValueError(f"{resume_from_checkpoint} is not a complete checkpoint: {missing}")
        return resume_from_checkpoint

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `Trainer.train`, with `resolve_checkpoint`, alone in the output directory.

        Raises:
            RunInUseError: another run is training in `output_dir`.
            CheckpointWriteError: a checkpoint could not be written (a full disk).
            TrainingDivergedError: see `BaseArguments.stop_on_nan`.
        """
        writes = self.args.should_save and self.args.save_strategy != SaveStrategy.NO
        with run_lock(self.output_dir) if writes else nullcontext():
            # Decided by one process: others might look while it tidies up.
            resume: list[str | None] = [None]
            if self.args.process_index == 0:
                resume = [self.resolve_checkpoint(resume_from_checkpoint)]
            broadcast_object_list(resume)
            self.watch.clear()
            if resume[0] is None:
                self._start_anew()
            return super().train(resume[0], *args, **kwargs)

    def _start_anew(self) -> None:
        """Prepare a run that does not resume."""
        old = [str(path) for path in checkpoints(self.output_dir) if is_complete(path)]
        if old and self.args.save_strategy != SaveStrategy.NO:
            logger.warning(
                "a new run starts in %s, which holds checkpoints of an earlier one up to %s; "
                "resume_from_checkpoint=True would take the one of the highest step",
                self.output_dir,
                old[-1],
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run resumed from its last checkpoint has nothing left to do; the parent would make one
        # update too many before it looks.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

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
        # The parent may send every process here; they would write the same files at once.
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.output_dir)
        save_model(self.latent_model, directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(directory))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        directory = run_dir / f"checkpoint-{self.state.global_step}"
        main = self.args.should_save
        mark = {"format": FORMAT, "global_step": self.state.global_step}
        self._on_all(lambda: set_aside(directory) if main else None, f"make room for {directory}")
        try:
            self._on_all(
                lambda: self._write_checkpoint(model, trial, directory), f"write {directory}"
            )
            self._on_all(
                lambda: mark_complete(directory, mark) if main else None, f"complete {directory}"
            )
        except Exception as failure:  # tokenizers and torch raise no OSError for a full disk
            self._undo_checkpoint(directory, failure)
            raise  # not a matter of the disk
        self._on_all(
            lambda: drop_aside(directory) if main else None, f"remove what {directory} replaces"
        )
        if main:
            best = self.state.best_model_checkpoint
            keep = [directory] if best is None else [directory, Path(best)]
            rotate(run_dir, self.args.save_total_limit, keep)

    def _on_all(self, work: Callable[[], None], what: str) -> None:
        on_all(self.accelerator, work, what)

    def _write_checkpoint(self, model: nn.Module, trial: Any, directory: Path) -> None:
        # The parent would rotate before this checkpoint is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.save_only_model:
            self.stateful.save(
                directory, rank=self.args.process_index, world_size=self.args.world_size
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; within a checkpoint, what fails on one process fails on all.

        With a best model to keep the parent has every process wait for the weights before it goes
        on: a process that could not write them would never get there.
        """
        if not _internal_call:
            super().save_model(output_dir)
            return
        self._on_all(
            lambda: super(BaseTrainer, self).save_model(output_dir, _internal_call=True),
            f"write the model to {output_dir or self.output_dir}",
        )

    def _undo_checkpoint(self, directory: Path, failure: Exception) -> None:
        """Remove an unfinished checkpoint, put back what it replaces and raise what that means for
        the run; return where the failure is a defect, which says enough itself."""
        problem = write_error(directory, failure)
        clear_frames(failure)
        # Every process has looked at what is there before one removes it.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            put_back(directory)
        if not isinstance(failure, (TypeError, ValueError, KeyError, AttributeError)):
            raise problem from failure

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        directory = Path(resume_from_checkpoint)

        def load() -> None:
            with naming(directory / TRAINER_STATE_NAME):
                TrainerState.load_from_json(str(directory / TRAINER_STATE_NAME))
            load_model(self.latent_model, directory)
            rank, world_size = self.args.process_index, self.args.world_size
            self.stateful.load(directory, rank=rank, world_size=world_size)

        self._on_all(load, f"resume from {directory}")

    # What the Trainer reads itself names no file when it fails.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with naming(f"{checkpoint}/optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with naming(f"{checkpoint}/scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with naming(f"{checkpoint}/rng_state*.pth"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            self._on_all(lambda: load_model(self.latent_model, Path(best)), f"load {best}")
