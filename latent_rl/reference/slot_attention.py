"""Reference of slot_attention."""

from __future__ import annotations

import torch
from torch import Tensor


def slot_attention(
    query: Tensor, keys: Tensor, values: Tensor, runs: Tensor, longest: int, scale: float
) -> Tensor:
    """Softmax attention of one position per row over a shared run of positions and its own.

    Args:
        query: [N, Hq, D]. keys: [S, Hk, D]. values: [S, Hk, E]; Hq is a multiple of Hk and query
            head h reads key head h // (Hq / Hk).
        runs: int64 [N, 5]: begin, end, shared_at, shared, own_at. Position j of a row lies at
            shared_at + j while j < shared, and at own_at + j - shared from there on; the row sees
            begin <= j < end.
        longest: positions from here on are seen by nobody.
        scale: of the products.

    Returns:
        [N, Hq, E] in the query's dtype; zeros for a row that sees nothing.
    """
    accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows, heads, dim = query.shape
    key_heads = keys.shape[1]
    begins, ends, shared_at, shared, own_at = runs[:, :, None].unbind(1)
    j = torch.arange(longest, device=query.device)
    at = torch.where(j < shared, shared_at + j, own_at + j - shared)
    visible = (j >= begins) & (j < ends)
    at = torch.where(visible, at, 0)
    packed = query.to(accumulator).view(rows, key_heads, heads // key_heads, dim) * scale
    scores = torch.einsum("nhgd,nlhd->nhgl", packed, keys[at].to(accumulator))
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    weights = torch.where(visible.any(-1)[:, None, None, None], scores, 0).softmax(-1)
    weights = weights * visible[:, None, None]
    # A hidden position contributes nothing, whatever stands in it.
    seen = values[at].to(accumulator).masked_fill(~visible[:, :, None, None], 0)
    out = torch.einsum("nhgl,nlhe->nhge", weights, seen)
    return out.reshape(rows, heads, values.shape[-1]).to(query.dtype)
