"""Stage 4: the policy learns to predict, from the past alone, the code the inverse model
inferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from latent_rl.train.features import labels_of, trace_of
from latent_rl.train.freezing import Trainable
from latent_rl.train.stages.base import Batch, Stage, StageOutput
from latent_rl.train.stages.world_model import code_usage
from latent_rl.train.token_loss import next_tokens, response_mask, token_cross_entropy

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["BehaviourCloning"]


@dataclass(frozen=True)
class BehaviourCloning(Stage):
    """CE of the policy's logits against the inverse model's code, on response positions.

    soft_targets: clone the inverse model's distribution over codes instead of its mode. Hard is the
    default: soft targets of a vector quantizer are near uniform and their policy explores without
    direction.
    """

    name: ClassVar[str] = "behaviour_cloning"

    learning_rate: float = 1e-4
    soft_targets: bool = False

    def trainable(self, model: LatentActionModel) -> list[Trainable]:
        """The policy's tower and head."""
        return [model.latent.policy]

    def loss(self, model: LatentActionModel, batch: Batch) -> StageOutput:
        """See the class."""
        trace = trace_of(model, batch)
        with torch.no_grad():
            state = model.state(trace)
            inverse = model.inverse(state, trace)
            mask = response_mask(labels_of(batch, trace)) & inverse.valid
            head = inverse.head[mask]
            codes = model.inverse_codes(head)
        logits = model.policy_logits(state, trace)[mask]
        count = max(1, codes.numel())
        targets = model.code_scores(head).softmax(-1).detach() if self.soft_targets else codes
        loss = (
            nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / count
        )
        with torch.no_grad():
            predicted = logits.argmax(-1)
            metrics = {
                "accuracy": (predicted == codes).sum() / count,
                "policy_entropy": torch.special.entr(logits.softmax(-1)).sum() / count,
                **code_usage(codes, model.latent_config.num_codes),
                "policy_codes_used": code_usage(predicted, model.latent_config.num_codes)[
                    "codes_used"
                ],
            }
        return StageOutput(loss, metrics)

    @torch.no_grad()
    def probe(self, model: LatentActionModel, batch: Batch) -> dict[str, Tensor]:
        """`policy_ce`: cross-entropy of the response under the policy's most likely codes."""
        trace = trace_of(model, batch)
        labels = labels_of(batch, trace)
        mask = response_mask(labels)
        state = model.state(trace)
        codes = model.policy_logits(state, trace)[mask].argmax(-1)
        merged = model.merge(state[mask], codes)
        return {"policy_ce": token_cross_entropy(model, merged, next_tokens(labels)[mask])}
