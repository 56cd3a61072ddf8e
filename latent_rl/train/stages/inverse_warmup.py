"""Stage 1: inverse dynamics, codebook and merge learn to explain the next token through a code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from latent_rl.nn import EmaCodebook
from latent_rl.train.features import labels_of, trace_of
from latent_rl.train.freezing import Trainable
from latent_rl.train.stages.base import Batch, Stage, StageOutput
from latent_rl.train.stages.world_model import (
    code_usage,
    draw_seed,
    infer_codes,
    probe_codes,
    world_model_loss,
)
from latent_rl.train.token_loss import response_mask

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["InverseWarmup"]


@dataclass(frozen=True)
class InverseWarmup(Stage):
    """CE(token t+1 | merge(e_t, c[a_t])) + quantizer loss + entropy_weight * mean(sum p log p).

    a_t is the quantised reading of the inverse tower, which has seen token t+1. The last term
    *raises* the entropy of each token's code distribution (the paper's regulariser); it is 0 for
    the vector quantizer, which has no distribution. Code usage over the batch is kept up by the
    quantizer's own loss: `GumbelQuantizer.marginal_entropy` (0.02 by default) or dead-code revival.

    kmeans_batches: batches whose features set an EMA codebook before the first step.
    """

    name: ClassVar[str] = "inverse_warmup"

    learning_rate: float = 1e-4
    entropy_weight: float = 1e-3
    kmeans_batches: int = 4

    def trainable(self, model: LatentActionModel) -> list[Trainable]:
        """Inverse tower and head, codebook, merge."""
        latent = model.latent
        return [latent.inverse, latent.quantizer, latent.merge]

    @torch.no_grad()
    def prepare(self, model: LatentActionModel, batches: Iterable[Batch]) -> None:
        """Place an untrained EMA codebook by k-means on the inverse features of a few batches."""
        codebook = model.latent.quantizer.codebook
        if not isinstance(codebook, EmaCodebook) or bool(codebook.initialised):
            return
        features: list[Tensor] = []
        for batch in islice(batches, self.kmeans_batches):
            trace = trace_of(model, batch)
            inverse = model.inverse(model.state(trace), trace)
            features.append(inverse.head[response_mask(labels_of(batch, trace)) & inverse.valid])
        if features:
            codebook.initialise(torch.cat(features))

    def loss(self, model: LatentActionModel, batch: Batch) -> StageOutput:
        """See the class."""
        trace = trace_of(model, batch)
        inferred = infer_codes(model, trace, labels_of(batch, trace), seed=draw_seed())
        ce = world_model_loss(model, inferred)
        entropy = inferred.entropy.sum() / max(1, inferred.entropy.numel())
        loss = ce + inferred.quantizer_loss - self.entropy_weight * entropy
        metrics = {
            "ce": ce.detach(),
            "quantizer_loss": inferred.quantizer_loss.detach(),
            "code_entropy": entropy.detach(),
            **code_usage(inferred.codes, model.latent_config.num_codes),
        }
        return StageOutput(loss, metrics)

    @torch.no_grad()
    def probe(self, model: LatentActionModel, batch: Batch) -> dict[str, Tensor]:
        """`base_ce` (no codes) and `random_ce` (random codes) on the batch."""
        trace = trace_of(model, batch)
        inferred = infer_codes(model, trace, labels_of(batch, trace), seed=0)
        return probe_codes(model, inferred.state, inferred.targets)
