"""StageTrainer: a transformers.Trainer that runs one stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler
from transformers import TrainerCallback

from latent_rl.train.arguments import BaseArguments
from latent_rl.train.base_trainer import BaseTrainer
from latent_rl.train.feature_cache import FeatureCache, collate_features
from latent_rl.train.forwarding import forward_through
from latent_rl.train.freezing import freeze, set_training_modes
from latent_rl.train.samplers import LengthGroupedSampler
from latent_rl.train.stages.base import Batch, Stage
from latent_rl.train.token_loss import response_mask

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["StageArguments", "StageTrainer"]


@dataclass
class StageArguments(BaseArguments):
    """`BaseArguments` whose learning rate and schedule default to the stage's own.

    learning_rate        None takes `stage.learning_rate`
    use_stage_schedule   True takes `stage.schedule`; False the `lr_scheduler_*` and `warmup_*`
                         fields
    probe                whether logging steps also run the stage's costlier diagnostics
    max_length           tokens of a row, at most, images included: longer ones are cut at the end;
                         None cuts none. For the collator that the trainer makes itself
    """

    learning_rate: float | None = None  # type: ignore[assignment]
    use_stage_schedule: bool = True
    probe: bool = True
    max_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(
                f"StageArguments: max_length must be >= 1 or None, got {self.max_length}"
            )


class StageTrainer(BaseTrainer):
    """Trains the modules a stage names, on the loss it defines.

    model             the LatentActionModel; everything the stage does not name is frozen in eval
                      mode
    stage             a `Stage` object
    args              `StageArguments`
    train_dataset     rows for `data_collator`, or a `FeatureCache` (its own collator is used then)
    data_collator     rows -> batch; default: `ConversationCollator` or `PairedViewCollator` of
                      `latent_rl.data`, as the stage needs, around `processing_class`

    Raises ValueError for a stage that trains the backbone on cached features, or when no collator
    can be made.
    """

    args: StageArguments

    def __init__(
        self,
        model: LatentActionModel,
        stage: Stage,
        args: StageArguments,
        train_dataset: Any,
        eval_dataset: Any | None = None,
        processing_class: Any | None = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.stage = stage
        if args.learning_rate is None:
            args.learning_rate = stage.learning_rate
        if args.max_length is not None and (
            data_collator is not None or isinstance(train_dataset, FeatureCache)
        ):
            raise ValueError(
                "StageTrainer: max_length is for the trainer's own collator, got it beside "
                "data_collator or cached features"
            )
        self._window_tokens: float | None = None
        self._window_batches = 1
        self.freeze_report = freeze(model, stage.trainable(model))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator
            or _collator(stage, train_dataset, processing_class, args.max_length),
            callbacks=callbacks,
        )

    def _start_anew(self) -> None:
        """Let the stage look at its data, unless the run resumes."""
        super()._start_anew()
        model = self.latent_model
        model.eval()
        self.stage.prepare(model, self._preparation_batches())

    def _preparation_batches(self) -> Iterator[Batch]:
        # A loader of its own: iterating the training loader would move its random state.
        rng_state = torch.random.get_rng_state()
        try:
            for batch in self.get_train_dataloader():
                yield self._prepare_inputs(dict(batch))
        finally:
            torch.random.set_rng_state(rng_state)

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """Build the stage's schedule unless the arguments ask for their own."""
        if not self.args.use_stage_schedule:
            scheduler: LRScheduler = super().create_scheduler(num_training_steps, optimizer)
            return scheduler
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            # accelerate wraps the optimiser; a torch scheduler wants the one inside.
            chosen = getattr(chosen, "optimizer", chosen)
            self.lr_scheduler = self.stage.schedule.build(chosen, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """As the parent's, and count the response tokens of the accumulation window: with
        `average_tokens_across_devices` their mean over the processes."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = float(sum(int(response_mask(batch["labels"]).sum()) for batch in samples))
        if self._averages_over_processes:
            mine = torch.tensor([tokens], device=device)
            tokens = float(self.accelerator.gather(mine).mean())
        self._window_tokens, self._window_batches = tokens, len(samples)
        return samples, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the stage's loss, each micro-batch weighted by its share of response tokens (a
        mean of means would favour the tokens of short answers), on every process alike."""
        inner = self.latent_model
        training = model.training
        if training:
            set_training_modes(inner, self.stage.trainable(inner))
        with self.accelerator.autocast():
            output = forward_through(model, inner, lambda: self.stage.loss(inner, inputs))
            probed = self._probe(inner, inputs) if self._probes_now(training) else {}
        averages = self.averages if training else self.eval_averages
        averages.add({**output.metrics, **probed})
        loss = output.loss
        shares = self._window_batches > 1 or self._averages_over_processes
        if training and shares and self._window_tokens:
            share = response_mask(inputs["labels"]).sum() / self._window_tokens
            loss = loss * (share * self._window_batches)
        return (loss, {}) if return_outputs else loss

    @property
    def _averages_over_processes(self) -> bool:
        """Whether gradients, which are averaged over processes, should be those of all tokens."""
        return bool(self.args.average_tokens_across_devices) and self.args.world_size > 1

    def _probes_now(self, training: bool) -> bool:
        if not self.args.probe:
            return False
        every = max(1, int(self.state.logging_steps or 1))
        return not training or (self.state.global_step + 1) % every == 0

    def _probe(self, model: LatentActionModel, inputs: Batch) -> dict[str, Tensor]:
        """Run the stage's diagnostics without training anything, running averages included."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return self.stage.probe(model, inputs)
        finally:
            if training:
                set_training_modes(model, self.stage.trainable(model))

    def _moved_by_forward(self) -> list[Tensor]:
        """The running averages of an EMA codebook, and the codes made of them."""
        state = self.latent_model.latent.quantizer.state_dict(keep_vars=True)
        return [tensor for tensor in state.values() if not tensor.requires_grad]

    def _describe(self, handle: Batch) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The batch as collated, and its text; a cached batch has token ids in its labels only."""
        tensors = dict(_tensors(handle))
        texts: list[str] = []
        ids = tensors.get("inputs.input_ids")
        decode = getattr(self.processing_class, "batch_decode", None)
        if ids is not None and decode is not None:
            texts = decode(ids)
        return tensors, {"texts": texts}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluate the stage's loss and metrics on a batch."""
        with torch.no_grad():
            loss: Tensor = self.compute_loss(model, self._prepare_inputs(dict(inputs)))
        return loss.detach(), None, None

    def _get_train_sampler(self, train_dataset: Any | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths: Sequence[int] | None = getattr(dataset, "lengths", None)
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        grouped = LengthGroupedSampler(lengths, self.args.train_batch_size, seed=self.args.seed)
        self.epoch_sampler = grouped
        return grouped


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings and dataclasses, by dotted names."""
    if isinstance(value, Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), f"{name}.{field.name}".strip("."))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}".strip("."))


def _collator(
    stage: Stage, train_dataset: Any, processing_class: Any | None, max_length: int | None
) -> Callable[[list[Any]], Batch]:
    if isinstance(train_dataset, FeatureCache):
        if not stage.cacheable:
            raise ValueError(f"{stage.name}: trains the backbone, cached features cannot serve it")
        return collate_features
    if processing_class is None:
        raise ValueError("StageTrainer: give processing_class or data_collator")
    from latent_rl.data import ConversationCollator, PairedViewCollator

    collator: Callable[[list[Any]], Batch] = (
        PairedViewCollator(processing_class, max_length=max_length)
        if stage.paired_views
        else ConversationCollator(processing_class, max_length=max_length)
    )
    return collator
