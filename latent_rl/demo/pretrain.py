"""Pre-training and supervised fine-tuning of the demo's base model, from scratch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from latent_rl.data import ConversationCollator
from latent_rl.data.render import Encoded

__all__ = ["PHASES", "Phase", "phases_at", "pretrain"]


@dataclass(frozen=True)
class Phase:
    """A stretch of training on one mixture.

    Attributes:
        shares: part of every batch by name of the corpus.
        steps: batches of ``batch_size`` rows.
        learning_rate: peak of the phase's one-cycle schedule; 3e-3 learns to look up a profile in
            some 300 steps, 4e-3 never did.
    """

    shares: Mapping[str, float]
    steps: int
    learning_rate: float
    batch_size: int = 48


# First to see digits, to read a profile and a set of roles in clean text, and some English; then
# how people really answer about pictures, which is uneven.
PHASES = (
    Phase({"captions": 0.34, "texts": 0.58, "exchanges": 0.08}, 500, 3e-3),
    Phase({"captions": 0.08, "texts": 0.12, "dialogues": 0.8}, 200, 1.5e-3),
)


def phases_at(scale: float, phases: Sequence[Phase] = PHASES) -> tuple[Phase, ...]:
    """The phases with ``scale`` times their steps, two at least."""
    return tuple(replace(phase, steps=max(2, round(phase.steps * scale))) for phase in phases)


def pretrain(
    model: nn.Module,
    processor: Any,
    corpora: Mapping[str, Sequence[Encoded]],
    phases: Sequence[Phase],
    seed: int,
    on_step: Callable[[int, float], None],
) -> list[float]:
    """Train every weight on response tokens, phase by phase; returns the loss by step.

    It keeps no checkpoints: it takes a minute or two, and a run that starts over ends in the same
    weights, since rows, order and initial weights all follow from the seed.

    Args:
        model: the image-text model; trained in place and left in eval mode.
        processor: its processor.
        corpora: encoded rows by the names that the phases' shares use.
        phases: what to train on in turn.
        seed: of the rows' order.
        on_step: called with (step over all phases, loss) after every step.

    Raises:
        KeyError: for a phase that names a corpus which is not given.
    """
    rng = np.random.default_rng(seed)
    losses: list[float] = []
    model.train()
    for phase in phases:
        _run_phase(model, ConversationCollator(processor), corpora, phase, rng, losses, on_step)
    model.eval()
    return losses


def _run_phase(
    model: nn.Module,
    collator: ConversationCollator,
    corpora: Mapping[str, Sequence[Encoded]],
    phase: Phase,
    rng: np.random.Generator,
    losses: list[float],
    on_step: Callable[[int, float], None],
) -> None:
    draw = _batches([(share, corpora[name]) for name, share in phase.shares.items()], phase, rng)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, phase.learning_rate, total_steps=phase.steps + 1, pct_start=0.1
    )
    for _ in range(phase.steps):
        batch = collator.pad(draw())
        loss = model(**batch["inputs"], labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        on_step(len(losses) - 1, losses[-1])


def _batches(
    corpora: Sequence[tuple[float, Sequence[Encoded]]], phase: Phase, rng: np.random.Generator
) -> Callable[[], list[Encoded]]:
    """Draws batches in which each corpus has its share; every corpus is shuffled in epochs."""
    orders: list[list[int]] = [[] for _ in corpora]

    def draw() -> list[Encoded]:
        batch = []
        for (share, rows), order in zip(corpora, orders, strict=True):
            for _ in range(max(1, round(share * phase.batch_size))):
                if not order:
                    order.extend(rng.permutation(len(rows)).tolist())
                batch.append(rows[order.pop()])
        return batch

    return draw
