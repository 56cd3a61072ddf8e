"""The stages as the paper's code makes them, rebuilt from its description, as peers.

Against ours: the model runs anew for every term of a loss (no states are shared between inverse
model, policy, projector and world model); the merge multiplies states and codes side by side in the
place of a table's rows; it and the vocabulary head run over every position, prompt and image
included, and the logits become float32 whole. The frozen trunk keeps no graph, as ours. The losses
are the same numbers, which the tests check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latent_rl import ops
from latent_rl.models import LatentActionModel, Trace
from latent_rl.nn import gaussian_nll
from latent_rl.train.features import AlignedViews, aligned_views
from latent_rl.train.stages import (
    BehaviourCloning,
    InverseWarmup,
    Joint,
    ProjectorWarmup,
    Stage,
    TaskSFT,
)
from latent_rl.train.stages.projector_warmup import projector_nll, require_projector
from latent_rl.train.stages.world_model import draw_seed
from latent_rl.train.token_loss import IGNORE_INDEX, next_tokens, response_mask

Batch = Mapping[str, Any]
Loss = Callable[[LatentActionModel, Batch], Tensor]


def trunk(model: LatentActionModel, batch: Batch, *, grad: bool = False) -> Trace:
    """The model once more."""
    return model.encode(batch["inputs"], grad=grad)


def merged(model: LatentActionModel, state: Tensor, vectors: Tensor) -> Tensor:
    """The residual merge with states and codes side by side; both [B, L, H]."""
    x = state
    blocks: list[Any] = list(model.latent.merge.blocks)
    for block in blocks:
        both = torch.cat([x, vectors.to(x.dtype)], -1)
        gate = nn.functional.silu(nn.functional.linear(both, block.w_gate))
        up = nn.functional.linear(both, block.w_up)
        x = x + nn.functional.linear(gate * up, block.w_down)
    return x


def whole_cross_entropy(model: LatentActionModel, state: Tensor, labels: Tensor) -> Tensor:
    """Mean over the response tokens, of logits of every position."""
    targets = next_tokens(labels)
    backbone: Any = model.backbone
    logits = backbone.get_output_embeddings()(state.to(model.dtype)).float()
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX
    )


def of_kind(batch: Batch, text_only: Tensor, *, text: bool) -> Batch:
    """The rows without an image, or those with one; bool [B] says which are which."""
    rows = text_only if text else ~text_only
    per_image = ("pixel_values", "image_grid_thw")
    inputs = {n: v[rows] for n, v in batch["inputs"].items() if n not in per_image}
    if not text:
        inputs |= {name: batch["inputs"][name] for name in per_image}
    return {"inputs": inputs, "labels": batch["labels"][rows]}


def world_model(model: LatentActionModel, batch: Batch, entropy_weight: float) -> Tensor:
    """Cross-entropy under inferred codes, rows of text a term of their own with a forward of their
    own, and the quantizer's terms."""
    trace = trunk(model, batch)
    text_only, state = trace.text_only, model.state(trace)
    inverse = model.inverse(state, trace)
    mask = response_mask(batch["labels"]) & inverse.valid
    quantized = model.quantize(inverse.head, mask, seed=draw_seed())
    paired = merged(model, state[~text_only], quantized.vectors[~text_only])
    loss = whole_cross_entropy(model, paired, batch["labels"][~text_only]) + quantized.loss
    if bool(text_only.any()):
        part = of_kind(batch, text_only, text=True)
        again = model.state(trunk(model, part))
        text = merged(model, again, quantized.vectors[text_only])
        loss = loss + whole_cross_entropy(model, text, part["labels"])
    entropy = quantized.entropy[mask].sum() / mask.sum().clamp(min=1)
    return loss - entropy_weight * entropy


def views_of(model: LatentActionModel, batch: Batch) -> AlignedViews:
    """Both views of the paired rows, each by a forward of its own."""
    text_only = model.text_only(batch["inputs"]["input_ids"])
    part = of_kind(batch, text_only, text=False)
    # Rows with an image come first, so their numbers are the same among themselves.
    view = {"text_view": batch["text_view"]}
    return aligned_views(model, {**part, **view}, trunk(model, part))


def inverse_warmup(stage: InverseWarmup) -> Loss:
    """See :class:`InverseWarmup`."""
    return lambda model, batch: world_model(model, batch, stage.entropy_weight)


def projector_warmup(stage: ProjectorWarmup) -> Loss:
    """See :class:`ProjectorWarmup`: a forward for each direction."""

    def loss(model: LatentActionModel, batch: Batch) -> Tensor:
        projector = require_projector(model, stage.name)
        forward, _ = projector_nll(projector, views_of(model, batch))
        _, backward = projector_nll(projector, views_of(model, batch))
        return forward + backward

    return loss


def joint(stage: Joint) -> Loss:
    """See :class:`Joint`."""

    def loss(model: LatentActionModel, batch: Batch) -> Tensor:
        projector = require_projector(model, stage.name)
        ce = world_model(model, batch, stage.entropy_weight)
        forward, backward = projector_nll(projector, views_of(model, batch))
        text_only = model.text_only(batch["inputs"]["input_ids"])
        trace = trunk(model, of_kind(batch, text_only, text=True))
        text = trace.hidden[trace.keep_mask & trace.text_only[:, None]]
        cycle = gaussian_nll(projector.to_text(projector(text)), text).sum() / max(1, len(text))
        return ce + stage.nll_weight * (forward + backward) + stage.cycle_weight * cycle

    return loss


def behaviour_cloning(stage: BehaviourCloning) -> Loss:
    """See :class:`BehaviourCloning`: a forward for the codes, another for the policy."""

    def loss(model: LatentActionModel, batch: Batch) -> Tensor:
        with torch.no_grad():
            trace = trunk(model, batch)
            inverse = model.inverse(model.state(trace), trace)
            mask = response_mask(batch["labels"]) & inverse.valid
            codes = model.inverse_codes(inverse.head).masked_fill(~mask, -1)
        trace = trunk(model, batch)
        logits = model.policy_logits(model.state(trace), trace)
        summed = nn.functional.cross_entropy(
            logits.flatten(0, 1), codes.flatten(), ignore_index=-1, reduction="sum"
        )
        return summed / mask.sum().clamp(min=1)

    return loss


def task_sft(stage: TaskSFT) -> Loss:
    """See :class:`TaskSFT`."""

    def loss(model: LatentActionModel, batch: Batch) -> Tensor:
        trace = trunk(model, batch, grad=True)
        mask = response_mask(batch["labels"])
        state = model.state(trace)
        logits = model.policy_logits(state, trace)
        codes = torch.zeros_like(mask, dtype=torch.int64)
        codes[mask] = ops.sample_codes(
            logits[mask].detach(), temperature=stage.temperature, seed=draw_seed()
        ).codes
        probs = logits.softmax(-1)
        codebook = model.latent.quantizer.codebook.weight.detach().float()
        hard = nn.functional.one_hot(codes, codebook.shape[0]).float()
        vectors = (hard + probs - probs.detach()) @ codebook
        return whole_cross_entropy(model, merged(model, state, vectors), batch["labels"])

    return loss


FORMS: dict[type[Stage], Callable[[Any], Loss]] = {
    InverseWarmup: inverse_warmup,
    ProjectorWarmup: projector_warmup,
    Joint: joint,
    BehaviourCloning: behaviour_cloning,
    TaskSFT: task_sft,
}


def paper_form(stage: Stage) -> Loss:
    """The stage's loss as the paper's code makes it."""
    return FORMS[type(stage)](stage)
