"""CUDA backend of quantize: the search of the dispatch table, then kernels for all that follows."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import address, dtype_code, rows_of
from latent_rl.native._segments_cuda import current_stream, group_rows

__all__ = ["quantize_backward_cuda", "quantize_forward_cuda"]


def quantize_forward_cuda(
    x: Tensor, codebook: Tensor, metric: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Vector quantization of rows, with the statistics of every code.

    As ``latent_rl.native.quantize.quantize_forward``, for CUDA tensors of float32, bfloat16 or
    float16: on torch's current stream, no host sync, bitwise repeatable.
    """
    rows, dim = x.shape
    num_codes, device = codebook.shape[0], x.device
    with torch.cuda.device(device):
        x, codebook = rows_of(x), codebook.contiguous()
        # Through torch's registry, so that the dispatch table chooses who searches.
        codes = torch.ops.latent_rl.nearest_codes(x[None], codebook[None], metric)[0]
        grouped = group_rows(codes, num_codes)
        quantized = torch.empty((rows, dim), dtype=x.dtype, device=device)
        error = torch.empty((), dtype=torch.float32, device=device)
        sums = torch.empty((num_codes, dim), dtype=torch.float32, device=device)
        perplexity = torch.empty((), dtype=torch.float32, device=device)
        partials = torch.empty(
            _C.segment_sum_workspace(rows, dim), dtype=torch.float32, device=device
        )
        block_errors = torch.empty(_C.QUANTIZE_BLOCKS, dtype=torch.float64, device=device)
        _C.quantize_forward_cuda(
            dtype_code("quantize", x),
            address(x),
            address(codebook),
            address(grouped.placed),
            address(grouped.first),
            address(quantized),
            address(error),
            address(sums),
            address(perplexity),
            address(partials),
            address(block_errors),
            rows,
            num_codes,
            dim,
            max(x.stride(0), dim),
            current_stream(x),
        )
    return codes, quantized, error, grouped.counts, sums, perplexity


def quantize_backward_cuda(
    grad_quantized: Tensor,
    grad_commitment: Tensor,
    grad_codebook_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    counts: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, D] and codebook [K, D].

    As ``latent_rl.native.quantize.quantize_backward``. Two launches; the gradients of the losses
    and the number of valid rows are read on the device.
    """
    rows, dim = x.shape
    with torch.cuda.device(x.device):
        x, codebook, codes = rows_of(x), codebook.contiguous(), codes.contiguous()
        counts, sums = counts.contiguous(), sums.contiguous()
        grad = rows_of(grad_quantized.to(x.dtype))
        commitment = grad_commitment.to(torch.float32)
        codebook_loss = grad_codebook_loss.to(torch.float32)
        dx = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
        dcodebook = torch.empty_like(codebook)
        scales = torch.empty(2, dtype=torch.float64, device=x.device)
        _C.quantize_backward_cuda(
            dtype_code("quantize", x),
            address(grad),
            address(commitment),
            address(codebook_loss),
            address(x),
            address(codebook),
            address(codes),
            address(counts),
            address(sums),
            address(dx),
            address(dcodebook),
            address(scales),
            rows,
            codebook.shape[0],
            dim,
            max(grad.stride(0), dim),
            max(x.stride(0), dim),
            current_stream(x),
        )
    return dx, dcodebook
