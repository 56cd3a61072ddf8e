"""A Trainer that judges every update before it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from latent_rl.models import LatentActionModel
from latent_rl.train.arguments import BaseArguments
from latent_rl.train.divergence import (
    BadBatch,
    Limits,
    TrainingDivergedError,
    UpdateWatch,
    non_finite_gradients,
    save_bad_batch,
)

__all__ = ["WatchedTrainer"]

WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
"""Where every process has all gradients in full."""


class WatchedTrainer(Trainer):
    """A transformers Trainer of a LatentActionModel that stops before a bad update.

    An update is judged between backward and the optimiser's step, where its gradient's norm is
    known and the weights are as they were. What does not pass is saved beside the checkpoints
    (`bad_batch-<step>.json` and `.safetensors`) and raised as a `TrainingDivergedError`.
    """

    args: BaseArguments

    def __init__(self, model: LatentActionModel, **arguments: Any) -> None:
        super().__init__(model=model, **arguments)
        limits = Limits(
            self.args.stop_on_nan, self.args.max_loss, self.args.max_grad_norm_before_stop
        )
        self.watch = UpdateWatch(limits, self.accelerator.gather)
        self._before: list[tuple[Tensor, Tensor]] = []

    @property
    def output_dir(self) -> Path:
        """Where checkpoints go (TrainingArguments fills its default in)."""
        return Path(self.args.output_dir or "trainer_output")

    @property
    def latent_model(self) -> LatentActionModel:
        """The model without the wrappers of distributed training."""
        model: Any = self.model
        if isinstance(model, LatentActionModel):
            # Nearly always; unwrapping costs milliseconds, and every micro-step asks.
            return model
        inner: LatentActionModel = self.accelerator.unwrap_model(model)
        return inner

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """As `Trainer.training_step`, noting the micro-batch and its loss."""
        if self.args.watches_updates and not len(self.watch):
            self._before = [(tensor, tensor.clone()) for tensor in self._moved_by_forward()]
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.args.watches_updates:
            # The Trainer has divided a mean by the number of micro-batches.
            self.watch.add(self._handle(inputs), loss * self.current_gradient_accumulation_steps)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._judged_norm(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            grad_norm = self._judged_norm(model, None)
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def _judged_norm(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Return the gradient's norm, and clip to `max_norm` unless the update is a bad one."""
        kind = self.accelerator.distributed_type
        if kind not in WHOLE_GRADIENTS or self._has_mixed_mesh_grads(model):
            # Sharded gradients: only the parent knows their norm, and it clips in the same breath.
            if max_norm is None:
                norm = super()._get_grad_norm(model)  # type: ignore[no-untyped-call]
            else:
                norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
            norm = torch.as_tensor(norm, device=self.args.device)
            self._judge(norm, known=False)
            return norm
        # Clipping by a norm of NaN would make every gradient NaN, and hide where it came from.
        self.accelerator.unscale_gradients()
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._judge(norm, known=True)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def _judge(self, norm: Tensor, *, known: bool) -> None:
        if not self.args.watches_updates:
            return
        bad = self.watch.judge(norm, scaled=self.accelerator.scaler is not None)
        if bad is not None:
            raise self._diverged(bad, known=known)

    def _diverged(self, bad: BadBatch, *, known: bool) -> TrainingDivergedError:
        """Save the update's batch; `known`: the gradients are as the backward pass left them."""
        with torch.no_grad():
            for tensor, value in self._before:
                tensor.copy_(value)
        step, rank = self.state.global_step + 1, self.args.process_index
        suffix = f".rank{rank}" if self.args.world_size > 1 else ""
        return save_bad_batch(
            self.output_dir / f"bad_batch-{step}{suffix}",
            bad,
            step=step,
            parameters=non_finite_gradients(self.latent_model) if known else None,
            described=[self._describe(batch) for batch in bad.batches],
        )

    def _moved_by_forward(self) -> list[Tensor]:
        """Return what forward passes of an update change in place, to be put back if it fails."""
        return []

    def _handle(self, inputs: Any) -> Any:
        """Return what `_describe` needs of a micro-batch; it is held until the update is made."""
        return inputs

    def _describe(self, handle: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a micro-batch for the file of a bad one: tensors, and values for JSON."""
        raise NotImplementedError
