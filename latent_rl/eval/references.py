"""What only a model can tell: cross-entropies and effects of codes on reference answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latent_rl.data import ConversationCollator, prompt_of
from latent_rl.eval.answering import Row
from latent_rl.eval.record import CodeEffect
from latent_rl.eval.world_model import WorldModelReport, world_model_report
from latent_rl.models import LatentActionModel
from latent_rl.models.inspection import code_top_tokens

__all__ = ["ReferenceMeasures", "measure_references"]

_BATCH = 8
_STATES = 256


@dataclass(frozen=True)
class ReferenceMeasures:
    """Cross-entropies by split, and what each code does on states of the first split."""

    world_model: Mapping[str, WorldModelReport] = field(default_factory=dict)
    code_effects: tuple[CodeEffect, ...] = ()


@torch.no_grad()
def measure_references(
    model: LatentActionModel,
    processor: Any,
    splits: Mapping[str, Sequence[Row]],
    *,
    rows_per_split: int = 64,
    top: int = 6,
) -> ReferenceMeasures:
    """Measure on the answers in the column ``reference`` (MMRole and PCogAlignBench rows have it).

    Args:
        model: in evaluation mode, on its device.
        processor: the model's.
        splits: RL rows; those without a reference are passed over, and splits without any.
        rows_per_split: rows used at most.
        top: tokens per code.
    """
    worlds: dict[str, WorldModelReport] = {}
    effects: tuple[CodeEffect, ...] = ()
    collator = ConversationCollator(processor)
    for split, rows in splits.items():
        spoken = [_conversation(row) for row in rows if row.get("reference")][:rows_per_split]
        batches = [
            _on(collator(spoken[start : start + _BATCH]), model.device)
            for start in range(0, len(spoken), _BATCH)
        ]
        if not batches:
            continue
        worlds[split] = world_model_report(model, batches)
        if not effects:
            effects = _effects(model, processor, batches, top)
    return ReferenceMeasures(worlds, effects)


def _conversation(row: Row) -> dict[str, Any]:
    messages, images = prompt_of(row)
    answer = {"role": "assistant", "content": [{"type": "text", "text": str(row["reference"])}]}
    return {"messages": [*messages, answer], "images": images}


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    inputs = {name: value.to(device) for name, value in batch["inputs"].items()}
    return {"inputs": inputs, "labels": batch["labels"].to(device)}


def _effects(
    model: LatentActionModel, processor: Any, batches: Sequence[Mapping[str, Any]], top: int
) -> tuple[CodeEffect, ...]:
    states: list[Tensor] = []
    for batch in batches:
        trace = model.encode(batch["inputs"])
        acts = batch["labels"][:, 1:] != -100
        states.append(model.state(trace)[:, :-1][acts])
    found = code_top_tokens(model, torch.cat(states)[:_STATES], top=top)
    return tuple(
        CodeEffect(
            code,
            tuple(processor.tokenizer.decode([token]) for token in ids),
            tuple(lifts),
        )
        for code, (ids, lifts) in enumerate(
            zip(found.token_ids.tolist(), found.lift.tolist(), strict=True)
        )
    )
