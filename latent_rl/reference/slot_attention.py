"""Reference of slot_attention."""

from __future__ import annotations

import torch
from torch import Tensor


def slot_attention(
    query: Tensor, keys: Tensor, values: Tensor, begins: Tensor, ends: Tensor, scale: float
) -> Tensor:
    """Softmax attention of one position per row over positions ``begins`` .. ``ends - 1``.

    Args:
        query: [N, Hq, D]. keys: [N, L, Hk, D]. values: [N, L, Hk, E]; Hq is a multiple of Hk and
            query head h reads key head h // (Hq / Hk).
        begins, ends: int64 [N], clipped to 0 .. L.
        scale: of the products.

    Returns:
        [N, Hq, E] in the query's dtype; zeros for a row that sees nothing.
    """
    accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows, heads, dim = query.shape
    length, key_heads = keys.shape[1], keys.shape[2]
    packed = query.to(accumulator).view(rows, key_heads, heads // key_heads, dim) * scale
    scores = torch.einsum("nhgd,nlhd->nhgl", packed, keys.to(accumulator))
    at = torch.arange(length, device=query.device)
    visible = (at >= begins[:, None]) & (at < ends[:, None])
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    weights = torch.where(visible.any(-1)[:, None, None, None], scores, 0).softmax(-1)
    weights = weights * visible[:, None, None]
    # A hidden position contributes nothing, whatever stands in it.
    seen = values.to(accumulator).masked_fill(~visible[:, :, None, None], 0)
    out = torch.einsum("nhgl,nlhe->nhge", weights, seen)
    return out.reshape(rows, heads, values.shape[-1]).to(query.dtype)
