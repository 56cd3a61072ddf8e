"""Sums of rows by code."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import accumulator, address, dtype_code, rows_of, threads

__all__ = ["segment_sum"]


def segment_sum(values: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """Sum of the rows of each code, added in row order whatever the number of threads.

    Args:
        values: [N, D] on the CPU. codes: int64 [N]; rows with a code outside [0, K) are left out.

    Returns:
        [K, D], float64 for float64 input and float32 otherwise.
    """
    rows, dim = values.shape
    values, codes = rows_of(values), codes.contiguous()
    sums = torch.empty((num_codes, dim), dtype=accumulator(values.dtype))
    _C.segment_sum(
        dtype_code("segment_sum", values),
        address(values),
        address(codes),
        address(sums),
        rows,
        num_codes,
        dim,
        max(values.stride(0), dim),
        threads(),
    )
    return sums
