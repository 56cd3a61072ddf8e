"""C++ backend of quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import accumulator, address, dtype_code, rows_of, threads
from latent_rl.native.nearest_code import nearest_codes

__all__ = ["quantize_backward", "quantize_forward"]


def quantize_forward(
    x: Tensor, codebook: Tensor, metric: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Vector quantization of rows, with the statistics of every code.

    Args:
        x: [N, D] on the CPU, any strides.
        codebook: [K, D], same dtype.
        metric: as in ``nearest_code``.

    Returns:
        codes int64 [N] (-1 where the row is not finite); quantized [N, D] = codebook[codes] (NaN
        rows for -1); mean squared error over valid rows and D; counts int64 [K]; sums [K, D] of the
        rows of each code, added in row order; perplexity exp(H(counts / total)). Floats but
        ``quantized`` are float64 for float64 input and float32 otherwise. Without valid rows the
        error is 0 and the perplexity 1.
    """
    rows, dim = x.shape
    num_codes = codebook.shape[0]
    x, codebook = rows_of(x), codebook.contiguous()
    acc = accumulator(x.dtype)
    codes = nearest_codes(x[None], codebook[None], metric)[0]
    quantized = torch.empty((rows, dim), dtype=x.dtype)
    counts = torch.empty(num_codes, dtype=torch.int64)
    sums = torch.empty((num_codes, dim), dtype=acc)
    square_sum = _C.quantize_forward(
        dtype_code("quantize", x),
        address(x),
        address(codebook),
        address(codes),
        address(quantized),
        address(counts),
        address(sums),
        rows,
        num_codes,
        dim,
        max(x.stride(0), dim),
        threads(),
    )
    usage = counts.double()
    total = usage.sum().clamp(min=1)
    perplexity = torch.special.entr(usage / total).sum().exp()
    error = square_sum / (total * dim)
    return codes, quantized, error.to(acc), counts, sums, perplexity.to(acc)


def quantize_backward(
    grad_quantized: Tensor,
    grad_commitment: Tensor,
    grad_codebook_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    counts: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, D] (straight-through plus commitment) and codebook [K, D].

    dx = g + g_commit * 2 (x - c) / (V D); dc_k = g_codebook * 2 (n_k c_k - s_k) / (V D), with V
    the number of valid rows. Invalid rows get zero.
    """
    rows, dim = x.shape
    x, codebook, codes = rows_of(x), codebook.contiguous(), codes.contiguous()
    grad = _gradient_rows(grad_quantized, x.dtype)
    per_element = 2.0 / max(int(counts.sum()) * dim, 1)
    dx, dcodebook = torch.empty((rows, dim), dtype=x.dtype), torch.empty_like(codebook)
    counts, sums = counts.contiguous(), sums.contiguous()
    _C.quantize_backward(
        dtype_code("quantize", x),
        address(grad),
        address(x),
        address(codebook),
        address(codes),
        address(counts),
        address(sums),
        address(dx),
        address(dcodebook),
        float(grad_commitment) * per_element,
        float(grad_codebook_loss) * per_element,
        rows,
        codebook.shape[0],
        dim,
        max(grad.stride(0), dim) if grad.shape[0] == rows else 0,
        max(x.stride(0), dim),
        threads(),
    )
    return dx, dcodebook


def _gradient_rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient's rows in ``dtype``; one row where all are the same memory (that of a sum)."""
    if grad.stride(0) == 0 and grad.shape[0] > 1:
        grad = grad[:1]
    return rows_of(grad.to(dtype))
