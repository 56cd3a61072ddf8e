"""slot_attention: one decoding position per row over a shared prompt and the row's own slot."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl.ops import _checks
from latent_rl.ops._library import define

__all__ = ["slot_attention"]

OP = "slot_attention"


def _fake(
    query: Tensor, keys: Tensor, values: Tensor, runs: Tensor, longest: int, scale: float
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[-1])


define(
    OP,
    OP,
    "(Tensor query, Tensor keys, Tensor values, Tensor runs, SymInt longest, float scale)"
    " -> Tensor",
    _fake,
)


def slot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    runs: Tensor,
    *,
    longest: int,
    scale: float | None = None,
) -> Tensor:
    """Attend from one position per row: ``softmax(scale q K^T) V`` over ``begin <= j < end``.

    A row's positions lie in two runs of the storage: the first ``shared`` of them anywhere, so that
    the completions of a prompt read one copy of its keys, the others in the row's own slot. Rows
    have positions of their own and nothing outside them is read, so slots of very different lengths
    share a call. Keys and values are read once per key head, never repeated for grouped queries. A
    row's result depends on its own positions alone.

    Args:
        query: [N, Hq, D]; float32, bfloat16, float16 or float64, any strides.
        keys: [S, Hk, D], same dtype; Hq a multiple of Hk, query head h reads key head
            ``h // (Hq / Hk)``.
        values: [S, Hk, E].
        runs: int64 [N, 5], per row ``begin, end, shared_at, shared, own_at``. Position j lies at
            ``shared_at + j`` while ``j < shared`` and at ``own_at + j - shared`` from there on.
            What is seen must lie within S (checked on the CPU; clamped into it on a GPU).
        longest: >= 1; no row sees positions from here on.
        scale: default ``D ** -0.5``.

    Returns:
        [N, Hq, E] in the query's dtype; zeros for a row that sees nothing. Sums are float32
        (float64 for float64). Not differentiable.

    Raises:
        TypeError: for dtypes. ValueError: for shapes, and for positions outside the storage.
    """
    _checks.check_float(OP, "query", query)
    _checks.check_ndim(OP, "query", query, 3, "[N, Hq, D]")
    _checks.check_ndim(OP, "keys", keys, 3, "[S, Hk, D]")
    _checks.check_ndim(OP, "values", values, 3, "[S, Hk, E]")
    rows, heads, dim = query.shape
    for name, tensor in (("keys", keys), ("values", values)):
        _checks.check_like(OP, name, tensor, "query", query)
    _checks.check_shape(OP, "keys", keys, (*keys.shape[:2], dim))
    _checks.check_shape(OP, "values", values, (*keys.shape[:2], values.shape[2]))
    if keys.shape[1] < 1 or heads % keys.shape[1]:
        raise ValueError(f"{OP}: query heads ({heads}) must be a multiple of {keys.shape[1]}")
    if keys.shape[0] < 1:
        raise ValueError(f"{OP}: keys must have at least one position, got S = 0")
    if longest < 1:
        raise ValueError(f"{OP}: longest must be >= 1, got {longest}")
    _checks.check_codes(OP, "runs", runs)
    _checks.check_device(OP, "runs", runs, "query", query)
    _checks.check_shape(OP, "runs", runs, (rows, 5))
    out: Tensor = torch.ops.latent_rl.slot_attention(
        query.detach(), keys.detach(), values.detach(), runs, longest, scale or dim**-0.5
    )
    return out
