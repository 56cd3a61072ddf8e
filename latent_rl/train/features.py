"""Hidden states of a batch: from the frozen trunk, or from a cache that ran it before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel, Trace
    from latent_rl.train.stages.base import Batch

__all__ = ["AlignedViews", "aligned_views", "labels_of", "trace_of", "view_states"]


def trace_of(model: LatentActionModel, batch: Batch, *, grad: bool = False) -> Trace:
    """Return the batch's trace: the cached one if it carries `trace`, else one trunk forward.

    With grad the backbone's graph is kept (`TaskSFT`), which a cached trace cannot give.

    Raises:
        ValueError: neither `inputs` nor `trace`, or a cached trace with grad.
    """
    trace = batch.get("trace")
    if trace is not None:
        if grad:
            raise ValueError("trace_of: a cached trace has no graph, this stage needs `inputs`")
        moved: Trace = trace.to(next(model.latent.parameters()).device)
        return moved
    if "inputs" not in batch:
        raise ValueError(f"trace_of: a batch needs `inputs` or `trace`, got {sorted(batch)}")
    return model.encode(batch["inputs"], grad=grad)


def labels_of(batch: Batch, trace: Trace) -> Tensor:
    """Return labels [B, L] on the trace's device. Raises ValueError if missing or of another
    shape."""
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(f"labels_of: a batch needs `labels`, got {sorted(batch)}")
    if labels.shape != trace.hidden.shape[:2]:
        raise ValueError(
            f"labels_of: labels must be [B, L] {tuple(trace.hidden.shape[:2])}, "
            f"got {tuple(labels.shape)}"
        )
    moved: Tensor = labels.to(trace.hidden.device)
    return moved


class AlignedViews(NamedTuple):
    """The same T real text tokens seen with their image and without: image, text [T, H]."""

    image: Tensor
    text: Tensor


def aligned_views(model: LatentActionModel, batch: Batch, trace: Trace) -> AlignedViews:
    """Gather both views of the aligned tokens of the batch's paired rows (none if it has no such
    row).

    Raises:
        ValueError: the batch was not rendered with paired views although it holds `inputs`.
    """
    view: dict[str, Any] | None = batch.get("text_view")
    if view is None:
        if "inputs" in batch:
            raise ValueError("aligned_views: a batch needs `text_view`, use PairedViewCollator")
        nothing = trace.hidden.new_zeros(0, trace.hidden.shape[-1])
        return AlignedViews(nothing, nothing)
    device = trace.hidden.device
    rows, keep = view["rows"].to(device), view["keep_mask"].to(device)
    image = _gather(trace.hidden[rows], view["image_positions"].to(device))
    text = view_states(model, view) if rows.numel() else image
    return AlignedViews(image[keep], text.to(image)[keep])


def view_states(model: LatentActionModel, view: dict[str, Any]) -> Tensor:
    """Return the text view's states [P, M, H] of the aligned tokens, cached or encoded now."""
    if "hidden" in view:
        cached: Tensor = view["hidden"]
        return cached
    hidden = model.encode(view["inputs"], grad=False).hidden
    return _gather(hidden, view["text_positions"].to(hidden.device))


def _gather(hidden: Tensor, positions: Tensor) -> Tensor:
    """hidden [P, L, H], positions [P, M] -> [P, M, H]."""
    index = positions[..., None].expand(-1, -1, hidden.shape[-1])
    return torch.gather(hidden, 1, index)
