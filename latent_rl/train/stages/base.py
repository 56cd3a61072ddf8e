"""What a stage is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from latent_rl.train.freezing import Trainable

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["Batch", "CosineSchedule", "Stage", "StageOutput"]

Batch: TypeAlias = "Mapping[str, Any]"
"""What a collator gives: `inputs` (or a cached `trace`), `labels`, optionally `text_view`."""


@dataclass(frozen=True)
class StageOutput:
    """loss [] with gradient; metrics: detached scalars by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up over a share of the steps, then a cosine down to `floor` of the peak rate."""

    warmup: float = 0.03
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1):
            raise ValueError(
                f"CosineSchedule: need 0 <= warmup < 1 and 0 <= floor <= 1, got {self}"
            )

    def factor(self, step: int, num_steps: int) -> float:
        """Return the multiple of the peak learning rate at `step` of `num_steps`."""
        warmup_steps = math.ceil(self.warmup * num_steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def build(self, optimizer: Optimizer, num_steps: int) -> LambdaLR:
        """Return the schedule as a torch scheduler."""
        return LambdaLR(optimizer, lambda step: self.factor(step, num_steps))


@dataclass(frozen=True)
class Stage(ABC):
    """One training stage: what trains, on which loss, at which learning rate.

    A stage holds settings only; the same object can run twice. Losses and metrics are taken on
    response tokens of real positions (label != -100).
    """

    name: ClassVar[str]
    paired_views: ClassVar[bool] = False
    """Whether batches must hold `text_view` (which collator to use)."""
    cacheable: ClassVar[bool] = True
    """Whether the backbone is frozen, so that its hidden states may come from a FeatureCache."""

    learning_rate: float = 1e-4
    schedule: CosineSchedule = field(default_factory=CosineSchedule)

    @abstractmethod
    def trainable(self, model: LatentActionModel) -> list[Trainable]:
        """Return the modules and parameters this stage trains."""

    @abstractmethod
    def loss(self, model: LatentActionModel, batch: Batch) -> StageOutput:
        """Return the loss of one batch."""

    def prepare(self, model: LatentActionModel, batches: Iterable[Batch]) -> None:  # noqa: B027
        """Initialise from data before the first step of a fresh (not resumed) run."""

    def probe(self, model: LatentActionModel, batch: Batch) -> dict[str, Tensor]:
        """Return diagnostic metrics too costly for every step; called at logging steps and in
        evaluation, under no_grad."""
        return {}
