"""Stage 3: world model and projector together, on paired and text-only rows mixed in any ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from latent_rl.nn import gaussian_nll
from latent_rl.train.features import aligned_views, labels_of, trace_of
from latent_rl.train.freezing import Trainable
from latent_rl.train.stages.base import Batch, Stage, StageOutput
from latent_rl.train.stages.projector_warmup import projector_nll, require_projector
from latent_rl.train.stages.world_model import (
    code_usage,
    draw_seed,
    infer_codes,
    probe_codes,
    world_model_loss,
)

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel, Trace

__all__ = ["Joint"]


@dataclass(frozen=True)
class Joint(Stage):
    """CE(paired) + CE(text-only, e replaced by mu_P(e)) + quantizer loss + entropy term
    + nll_weight * (NLL of P + NLL of P') + cycle_weight * NLL(e_text | P'(mu_P(e_text))).

    Each cross-entropy is the mean over its own response tokens; a batch without rows of one kind
    lacks that term. The cycle term covers the real tokens of text-only rows. Entropy term as in
    `InverseWarmup`.
    """

    name: ClassVar[str] = "joint"
    paired_views: ClassVar[bool] = True

    learning_rate: float = 1e-4
    entropy_weight: float = 1e-3
    nll_weight: float = 1e-5
    cycle_weight: float = 1e-5

    def trainable(self, model: LatentActionModel) -> list[Trainable]:
        """Inverse tower and head, codebook, merge, projector."""
        latent = model.latent
        projector = require_projector(model, self.name)
        return [latent.inverse, latent.quantizer, latent.merge, projector]

    def loss(self, model: LatentActionModel, batch: Batch) -> StageOutput:
        """See the class."""
        projector = require_projector(model, self.name)
        trace = trace_of(model, batch)
        inferred = infer_codes(model, trace, labels_of(batch, trace), seed=draw_seed())
        ce_paired = world_model_loss(model, inferred, ~inferred.text_only)
        ce_text = world_model_loss(model, inferred, inferred.text_only)
        forward, backward = projector_nll(projector, aligned_views(model, batch, trace))
        cycle = self._cycle_nll(model, trace)
        entropy = inferred.entropy.sum() / max(1, inferred.entropy.numel())
        loss = (
            ce_paired
            + ce_text
            + inferred.quantizer_loss
            - self.entropy_weight * entropy
            + self.nll_weight * (forward + backward)
            + self.cycle_weight * cycle
        )
        # A term without rows is 0 in the loss, and no number in a mean over batches.
        has_text, has_views = bool(trace.text_only.any()), not bool(trace.text_only.all())
        paired = {
            "ce_paired": ce_paired.detach(),
            "nll_to_image_text": forward.detach(),
            "nll_to_text": backward.detach(),
        }
        text = {"ce_text": ce_text.detach(), "nll_cycle": cycle.detach()}
        metrics = {
            **(paired if has_views else {}),
            **(text if has_text else {}),
            "quantizer_loss": inferred.quantizer_loss.detach(),
            "code_entropy": entropy.detach(),
            **code_usage(inferred.codes, model.latent_config.num_codes),
        }
        return StageOutput(loss, metrics)

    def _cycle_nll(self, model: LatentActionModel, trace: Trace) -> Tensor:
        projector = require_projector(model, self.name)
        text = trace.hidden[trace.keep_mask & trace.text_only[:, None]]
        there_and_back = projector.to_text(projector(text))
        return gaussian_nll(there_and_back, text).sum() / max(1, text.shape[0])

    @torch.no_grad()
    def probe(self, model: LatentActionModel, batch: Batch) -> dict[str, Tensor]:
        """`base_ce` (no codes) and `random_ce` (random codes) on the batch."""
        trace = trace_of(model, batch)
        inferred = infer_codes(model, trace, labels_of(batch, trace), seed=0)
        return probe_codes(model, inferred.state, inferred.targets)
