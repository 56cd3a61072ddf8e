"""TRL's own trainers on the prompts, rewards and budget of a latent run."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from latent_rl.data import load_image
from latent_rl.data.rows import prompt_of
from latent_rl.rewards import RewardFunction, score_rows
from latent_rl.train.failure_watch import FailureWatch
from latent_rl.train.rl_config import LatentGRPOConfig
from latent_rl.train.samplers import GroupedRepeatSampler
from latent_rl.train.spending import SpendingMeter
from latent_rl.train.token_config import TOKEN_ALGORITHMS, token_arguments

__all__ = ["token_trainer"]

_ROW = "row"
# TRL's function that loads a reference model.
_LOADER = "create_model_from_path"


def token_trainer(
    model: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    args: LatentGRPOConfig,
    train_dataset: Any,
    eval_dataset: Any | None = None,
    processing_class: Any | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> Any:
    """TRL's trainer of `args.loss_type` over tokens, in the place of a `LatentGRPOTrainer`.

    It takes what that trainer takes, a plain image-text model excepted, and does the same work:
    the same prompts in the same order, as many completions for each optimizer step, the same
    reward functions called with the same columns, failed rewards dropped alike, the same metrics
    of what was spent. The loss, the generation and everything else are TRL's.

    Args:
        model: a transformers image-text model, PEFT-wrapped or not, the same checkpoint that the
            latent model stands on; every parameter is trained where it is not PEFT-wrapped.
        reward_funcs, args, train_dataset, eval_dataset, processing_class, callbacks: as for
            :class:`LatentGRPOTrainer`.

    Raises:
        ImportError: when TRL is not installed.
        ValueError: for settings that TRL does not have, see :func:`token_arguments`.
    """
    from datasets import Dataset

    if processing_class is None:
        raise ValueError("token_trainer: processing_class is required to render prompts")
    theirs = token_arguments(args)
    _, base = TOKEN_ALGORITHMS[args.loss_type].classes()
    functions = list(reward_funcs) if isinstance(reward_funcs, Sequence) else [reward_funcs]
    if not hasattr(model, "peft_config"):
        model.requires_grad_(True)

    def numbers(dataset: Any | None) -> Any:
        # TRL wants a Dataset. It gets row numbers, and rows are looked up when they are used:
        # images stay on disk until then, and rewards see the columns that latent rollouts give.
        return None if dataset is None else Dataset.from_dict({_ROW: list(range(len(dataset)))})

    with _reference_copied_from(model, base):
        trainer = _trainer_class(base)(
            model,
            functions,
            args=theirs,
            train_dataset=numbers(train_dataset),
            eval_dataset=numbers(eval_dataset),
            processing_class=processing_class,
            callbacks=callbacks,
        )
    trainer.share(args, functions, train_dataset, eval_dataset)
    return trainer


@contextmanager
def _reference_copied_from(model: Any, base: type[Any]) -> Iterator[None]:
    """While a trainer is built, make its reference a copy of `model`.

    TRL loads the reference anew from the name in the model's config. A model that was tuned since
    (`TaskSFT`) would then be held to weights that it does not start from.
    """
    module: Any = sys.modules[base.__module__]
    if not hasattr(module, _LOADER):
        raise ImportError(f"the token-level baseline needs another TRL: {module} has no {_LOADER}")
    original = getattr(module, _LOADER)
    setattr(module, _LOADER, lambda *args, **kwargs: copy.deepcopy(model))
    try:
        yield
    finally:
        setattr(module, _LOADER, original)


def _trainer_class(base: type[Any]) -> type[Any]:
    """TRL's trainer under our harness; a type of its own because TRL is imported late."""
    return type(f"Token{base.__name__}", (_Harness, base), {})


class _Harness:
    """Rows, order, rewards and accounting as in latent RL. Mixed into a trainer of TRL's."""

    # Of the trainer this is mixed into.
    args: Any
    accelerator: Any
    state: TrainerState
    model: nn.Module
    processing_class: Any
    num_generations: int
    num_iterations: int
    # What rewards may log beside their values.
    _log_completion_extra: Any
    _log_metric: Any

    def share(
        self,
        args: LatentGRPOConfig,
        functions: list[RewardFunction],
        train_rows: Any,
        eval_rows: Any,
    ) -> None:
        """Give the harness what it shares with the latent arm."""
        self.failures = FailureWatch(args.max_reward_failure_rate, args.reward_failure_window)
        self.functions = functions
        self.rows_of = {True: train_rows, False: eval_rows}
        self.meter = SpendingMeter()
        self.epoch_sampler: GroupedRepeatSampler | None = None
        self._failed: list[float] = []
        self.add_callback(self.meter)  # type: ignore[attr-defined]
        self.add_callback(_Epochs(self))  # type: ignore[attr-defined]

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        """The latent trainer's sampler: TRL's own has another order from the second epoch on."""
        args = self.args
        self.epoch_sampler = GroupedRepeatSampler(
            len(self.rows_of[True]),
            group_size=self.num_generations,
            prompts_per_chunk=args.generation_batch_size // self.num_generations,
            repeat=args.steps_per_generation * self.num_iterations,
            seed=args.seed,
            shuffle=bool(args.shuffle_dataset),
        )
        return self.epoch_sampler

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As TRL's, but True means the last checkpoint *if there is one*, as in the latent arm."""
        if resume_from_checkpoint is True:
            last: Any = get_last_checkpoint
            found = Path(self.args.output_dir).is_dir() and last(self.args.output_dir)
            resume_from_checkpoint = found or None
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, timed."""
        with self.meter.step():
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        training = self.model.training
        self._rows = [self.rows_of[training][item[_ROW]] for item in inputs]
        given = [_trl_row(row) for row in self._rows]
        if 0 < sum(not row["images"] for row in given) < len(given):
            raise ValueError(
                "token baseline: TRL cannot roll out rows with and without images together; "
                "give both arms rows of one kind"
            )
        if not training:
            return super()._generate_and_score_completions(given)  # type: ignore[misc]
        with self.meter.rollout():
            return super()._generate_and_score_completions(given)  # type: ignore[misc]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Any:
        """Rewards [B, F] over all processes; NaN where one does not apply or the row failed.

        TRL leaves rows of NaN out of every mean and gives them no advantage.

        Raises:
            RuntimeError: when rewards fail too often, as in the latent arm.
        """
        training, accelerator = self.model.training, self.accelerator
        texts = self.processing_class.batch_decode(completion_ids_list, skip_special_tokens=True)
        table = score_rows(
            self.functions,
            self._rows,
            texts,
            completion_ids_list,
            weights=self.args.reward_weights,
            extra={
                "trainer_state": self.state,
                "log_extra": self._log_completion_extra,
                "log_metric": self._log_metric,
            },
        )
        if training:
            self.meter.count(len(self._rows), sum(map(len, completion_ids_list)))
            self.failures.count(
                len(self._rows), sum(table.failed), sum(table.keep_mask), table.failures
            )
            self.failures.check(accelerator.gather, gather_object, accelerator.device)
        rewards = torch.tensor(table.per_function, device=accelerator.device).T.contiguous()
        rewards[~torch.tensor(table.keep_mask, device=rewards.device)] = math.nan
        self._failed.append(float(table.num_dropped))
        return accelerator.gather(rewards)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the latent trainer logs under the same names."""
        if "loss" in logs or "train_runtime" in logs:
            accelerator = self.accelerator
            logs |= self.meter.flush(self.state.global_step, accelerator.gather, accelerator.device)
        if self._failed:
            prefix = "" if self.model.training else "eval_"
            logs[f"{prefix}failed_rewards"] = sum(self._failed) / len(self._failed)
            self._failed = []
        super().log(logs, start_time)  # type: ignore[misc]


class _Epochs(TrainerCallback):
    """Tells the harness's sampler the epoch, also through the wrappers of a sharded loader."""

    def __init__(self, harness: _Harness) -> None:
        self._harness = harness

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._harness.epoch_sampler is not None:
            self._harness.epoch_sampler.set_epoch(int(state.epoch or 0))


def _trl_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt as TRL renders it: image parts named, images loaded."""
    messages, images = prompt_of(row)
    return {"prompt": messages, "images": [load_image(image) for image in images]}
