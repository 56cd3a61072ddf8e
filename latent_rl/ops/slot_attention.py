"""slot_attention: one decoding position per row over the cached keys of its own slot."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl.ops import _checks
from latent_rl.ops._library import define

__all__ = ["slot_attention"]

OP = "slot_attention"


def _fake(
    query: Tensor, keys: Tensor, values: Tensor, begins: Tensor, ends: Tensor, scale: float
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[-1])


define(
    OP,
    OP,
    "(Tensor query, Tensor keys, Tensor values, Tensor begins, Tensor ends, float scale) -> Tensor",
    _fake,
)


def slot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begins: Tensor,
    ends: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend from one position per row: ``softmax(scale q K^T) V`` over ``begins <= j < ends``.

    Rows have positions of their own and nothing outside them is read, so slots of very different
    lengths share a call. Keys and values are read once per key head, never repeated for grouped
    queries. A row's result depends on its own slot alone.

    Args:
        query: [N, Hq, D]; float32, bfloat16, float16 or float64, any strides.
        keys: [N, L, Hk, D], same dtype; Hq a multiple of Hk, query head h reads key head
            ``h // (Hq / Hk)``.
        values: [N, L, Hk, E].
        begins: int64 [N], first visible position; below 0 counts as 0.
        ends: int64 [N], one past the last; above L counts as L.
        scale: default ``D ** -0.5``.

    Returns:
        [N, Hq, E] in the query's dtype; zeros for a row that sees nothing. Sums are float32
        (float64 for float64). Not differentiable.

    Raises:
        TypeError: for dtypes. ValueError: for shapes.
    """
    _checks.check_float(OP, "query", query)
    _checks.check_ndim(OP, "query", query, 3, "[N, Hq, D]")
    _checks.check_ndim(OP, "keys", keys, 4, "[N, L, Hk, D]")
    _checks.check_ndim(OP, "values", values, 4, "[N, L, Hk, E]")
    rows, heads, dim = query.shape
    for name, tensor in (("keys", keys), ("values", values)):
        _checks.check_like(OP, name, tensor, "query", query)
    _checks.check_shape(OP, "keys", keys, (rows, keys.shape[1], keys.shape[2], dim))
    _checks.check_shape(OP, "values", values, (*keys.shape[:3], values.shape[3]))
    if keys.shape[2] < 1 or heads % keys.shape[2]:
        raise ValueError(f"{OP}: query heads ({heads}) must be a multiple of {keys.shape[2]}")
    if keys.shape[1] < 1:
        raise ValueError(f"{OP}: keys must have at least one position, got L = 0")
    for name, ids in (("begins", begins), ("ends", ends)):
        _checks.check_codes(OP, name, ids)
        _checks.check_device(OP, name, ids, "query", query)
        _checks.check_shape(OP, name, ids, (rows,))
    out: Tensor = torch.ops.latent_rl.slot_attention(
        query.detach(), keys.detach(), values.detach(), begins, ends, scale or dim**-0.5
    )
    return out
