"""What the C++ calls share: dtype codes, addresses and the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C

__all__ = ["accumulator", "address", "dtype_code", "empty", "rows_of", "threads"]

# The codes of csrc/dtype.h.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def dtype_code(op: str, tensor: Tensor) -> int:
    """Code of the tensor's dtype at the C++ boundary; TypeError for a dtype no op takes."""
    code = _DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise TypeError(
            f"{op}: dtype must be float32, float64, bfloat16 or float16, got {tensor.dtype}"
        )
    return code


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def address(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU, with large pages under many megabytes.

    Arrays above 32 MiB are mapped afresh on every call; faulting them in 4 KiB at a time costs more
    than filling them (a copy of codebook rows to 64 MiB: see kernels/gumbel_quantize/README.md).
    """
    tensor = torch.empty(shape, dtype=dtype)
    _C.use_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def rows_of(tensor: Tensor) -> Tensor:
    """The matrix itself when its rows are contiguous and do not overlap, else a contiguous copy."""
    width = tensor.shape[-1]
    fits = tensor.stride(-1) == 1 or width == 1
    return tensor if fits and tensor.stride(-2) >= width else tensor.contiguous()


def threads() -> int:
    """Threads an op may use: torch's own setting."""
    return torch.get_num_threads()
