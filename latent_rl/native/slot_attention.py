"""C++ backend of slot_attention."""

from __future__ import annotations

from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import address, dtype_code, threads

__all__ = ["slot_attention"]


def slot_attention(
    query: Tensor, keys: Tensor, values: Tensor, runs: Tensor, longest: int, scale: float
) -> Tensor:
    """Attention of one position per row over two runs; only visible positions are read.

    Args:
        query: [N, Hq, D] on the CPU. keys: [S, Hk, D]. values: [S, Hk, E]; all of one dtype, any
            strides.
        runs: int64 [N, 5], begin, end, shared_at, shared, own_at; see the reference.
        longest: no position from here on is seen.
        scale: of the products.

    Returns:
        [N, Hq, E]; zeros for a row that sees nothing. Sums are float32 (float64 for float64).

    Raises:
        ValueError: when a visible position lies outside the storage.
    """
    query, keys, values, runs = query.contiguous(), _heads(keys), _heads(values), runs.contiguous()
    rows, heads, dim = query.shape
    out = query.new_empty(rows, heads, values.shape[-1])
    _C.slot_attention(
        dtype_code("slot_attention", query),
        address(query),
        address(keys),
        address(values),
        address(runs),
        address(out),
        scale,
        rows,
        keys.shape[0],
        longest,
        heads,
        keys.shape[1],
        dim,
        values.shape[-1],
        keys.stride()[:2],
        values.stride()[:2],
        threads(),
    )
    return out


def _heads(tensor: Tensor) -> Tensor:
    """The tensor itself when a head's numbers are contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
