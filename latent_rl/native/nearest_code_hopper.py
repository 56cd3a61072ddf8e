"""The screen of nearest_code in CUDA C++ for Hopper: tensors in, nothing of its search."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import address, dtype_code

__all__ = ["WIDEST", "copyable", "screen"]

# Rows stay in shared memory while all codes pass by (kScreenWidest of cuda_impl.h).
WIDEST = 256
_COPY_BYTES = 16


def copyable(x: Tensor) -> Tensor:
    """``x`` [G, N, D] if Hopper's copy engine can read it where it lies, else a copy.

    It wants addresses and strides that are multiples of 16 bytes, and strides that nest. A copy is
    padded with zero columns to a multiple of 8, which changes no product.
    """
    groups, n, width = x.shape
    step = _COPY_BYTES // x.itemsize
    if width % step != 0:
        return torch.nn.functional.pad(x, (0, -width % step))
    group_stride, row_stride, column_stride = x.stride()
    fits = column_stride == 1 and row_stride % step == 0 and row_stride >= width
    fits = fits and x.data_ptr() % _COPY_BYTES == 0
    if groups > 1:
        fits = fits and group_stride % step == 0 and group_stride >= row_stride * n
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def screen(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    limits: Tensor,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    bounds: tuple[float, float, float],
) -> None:
    """Decide every row whose best score leads by more than the bound, and list the others.

    On torch's current stream; no host synchronisation.

    Args:
        x: bfloat16 or float16 [G, N, D], D a multiple of 8 up to 256, as :func:`copyable` gives it.
        table: [G, K, D] contiguous, as prepared; bias, scale: float32 [G, K]; scale None for ones.
        limits: float32 [G, 8].
        out: codes int64 [G, N], listed rows int64 [G, N], their thresholds float32 [G, N], and how
            many are listed, int32 [G], zero before.
        bounds: accumulation, underflow and slack of ``triton_impl.screen_bounds``.
    """
    groups, n, width = x.shape
    row_stride = max(x.stride(1), width)
    # A stride that is never used must be one that the copy engine takes.
    group_stride = x.stride(0) if groups > 1 else row_stride * n
    _C.nearest_screen_cuda(
        dtype_code("nearest_code", x),
        address(x),
        address(table),
        address(bias),
        address(scale),
        address(limits),
        address(out[0]),
        address(out[1]),
        address(out[2]),
        address(out[3]),
        groups,
        n,
        table.shape[1],
        width,
        group_stride,
        row_stride,
        bounds[0],
        bounds[1],
        bounds[2],
        torch.cuda.current_stream(x.device).cuda_stream,
    )
