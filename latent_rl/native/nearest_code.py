"""C++ backend of nearest_code."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import accumulator, address, dtype_code, rows_of, threads

__all__ = ["nearest_code"]

METRIC_CODES = {"l2": 0, "cosine": 1, "dot": 2}


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest code of every row: exactly the code float64 chooses, at float32 speed.

    Args:
        x: [G, N, D] on the CPU, any strides.
        codebook: [G, K, D], same dtype.
        metric: "l2" (squared Euclidean), "cosine" (1 - cosine) or "dot" (negated product).

    Returns:
        codes int64 [G, N], the lowest id on ties, -1 for rows that are not finite or when no code
        is; distances [G, N], float64 for float64 input and float32 otherwise, NaN where the code is
        -1. Neither depends on the number of threads or on the other rows.
    """
    groups, rows, dim = x.shape
    x, codebook = rows_of(x), codebook.contiguous()
    codes = torch.empty((groups, rows), dtype=torch.int64)
    distance = torch.empty((groups, rows), dtype=accumulator(x.dtype))
    _C.nearest_code(
        dtype_code("nearest_code", x),
        METRIC_CODES[metric],
        address(x),
        address(codebook),
        address(codes),
        address(distance),
        groups,
        rows,
        codebook.shape[1],
        dim,
        x.stride(0),
        max(x.stride(1), dim),
        threads(),
    )
    return codes, distance
