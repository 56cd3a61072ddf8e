"""C++ backend of slot_attention."""

from __future__ import annotations

from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import address, dtype_code, threads

__all__ = ["slot_attention"]


def slot_attention(
    query: Tensor, keys: Tensor, values: Tensor, begins: Tensor, ends: Tensor, scale: float
) -> Tensor:
    """Attention of one position per row over its own slot; only visible positions are read.

    Args:
        query: [N, Hq, D] on the CPU. keys: [N, L, Hk, D]. values: [N, L, Hk, E]; all of one
            dtype, any strides.
        begins, ends: int64 [N], clipped to 0 .. L.
        scale: of the products.

    Returns:
        [N, Hq, E]; zeros for a row that sees nothing. Sums are float32 (float64 for float64).
    """
    query, keys, values = query.contiguous(), _heads(keys), _heads(values)
    begins, ends = begins.contiguous(), ends.contiguous()
    rows, heads, dim = query.shape
    out = query.new_empty(rows, heads, values.shape[-1])
    _C.slot_attention(
        dtype_code("slot_attention", query),
        address(query),
        address(keys),
        address(values),
        address(begins),
        address(ends),
        address(out),
        scale,
        rows,
        keys.shape[1],
        heads,
        keys.shape[2],
        dim,
        values.shape[-1],
        keys.stride()[:3],
        values.stride()[:3],
        threads(),
    )
    return out


def _heads(tensor: Tensor) -> Tensor:
    """The tensor itself when a head's numbers are contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
