"""Rows grouped by code on a CUDA device, and their sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import address, dtype_code, rows_of

__all__ = ["GroupedRows", "current_stream", "group_rows", "segment_sum"]


class GroupedRows(NamedTuple):
    """Rows sorted by code, then by row.

    Attributes:
        placed: int32 [N, 2], rows and their codes; rows without a code stand last, with code K.
        first: int32 [K + 1], where each code begins in ``placed``; the last entry is the number of
            rows with a code.
        counts: int64 [K].
    """

    placed: Tensor
    first: Tensor
    counts: Tensor


def current_stream(tensor: Tensor) -> int:
    """torch's current stream on the tensor's device, as the kernels take it."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def group_rows(codes: Tensor, num_codes: int) -> GroupedRows:
    """Sort rows by code: one launch, or four for many rows or codes; stable, no host sync.

    Args:
        codes: int64 [N] on the current CUDA device; rows with a code outside [0, K) have none.
    """
    rows, device = codes.shape[0], codes.device
    codes = codes.contiguous()
    placed = torch.empty((rows, 2), dtype=torch.int32, device=device)
    first = torch.empty(num_codes + 1, dtype=torch.int32, device=device)
    counts = torch.empty(num_codes, dtype=torch.int64, device=device)
    workspace = torch.empty(
        _C.group_rows_workspace(rows, num_codes), dtype=torch.int32, device=device
    )
    _C.group_rows_cuda(
        address(codes),
        address(placed),
        address(first),
        address(counts),
        address(workspace),
        rows,
        num_codes,
        current_stream(codes),
    )
    return GroupedRows(placed, first, counts)


def segment_sum(values: Tensor, grouped: GroupedRows) -> Tensor:
    """Sum of the rows of each code, float32 [K, D], bitwise repeatable.

    Args:
        values: [N, D] float32, bfloat16 or float16, on the current CUDA device.
        grouped: the rows' codes, from :func:`group_rows`.
    """
    rows, dim = values.shape
    num_codes = grouped.counts.shape[0]
    values = rows_of(values)
    sums = torch.empty((num_codes, dim), dtype=torch.float32, device=values.device)
    partials = torch.empty(
        _C.segment_sum_workspace(rows, dim), dtype=torch.float32, device=values.device
    )
    _C.segment_sum_cuda(
        dtype_code("segment_sum", values),
        address(values),
        address(grouped.placed),
        address(grouped.first),
        address(sums),
        address(partials),
        rows,
        num_codes,
        dim,
        max(values.stride(0), dim),
        current_stream(values),
    )
    return sums
