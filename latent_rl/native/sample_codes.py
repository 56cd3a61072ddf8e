"""C++ and CUDA backends of sample_codes."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import accumulator, address, dtype_code, rows_of, threads

__all__ = ["MAX_CUDA_CODES", "sample_codes", "sample_codes_cuda"]

MAX_CUDA_CODES = 8192


def sample_codes(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seeds: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw one code per row by the Gumbel-max trick from the tempered, truncated distribution.

    Args:
        logits: [B, K] on the CPU, any strides; -inf masks a code.
        temperature: > 0, or 0 for the most likely code.
        top_k, top_p, min_p: truncations in this order; 0, 1 and 0 turn them off.
        seeds, offsets: int64 [B].

    Returns:
        codes int64 [B]; log-probability [B] under the distribution sampled from; log-probability
        [B] under softmax(logits); entropy [B] in nats of the distribution sampled from. A row with
        NaN or +inf, or without a code left, gives code -1 and NaN.
    """
    logits, seeds, offsets = rows_of(logits), seeds.contiguous(), offsets.contiguous()
    rows, num_codes = logits.shape
    codes, logprob, logprob_full, entropy = _outputs(logits, seeds)
    _C.sample_codes(
        dtype_code("sample_codes", logits),
        address(logits),
        address(seeds),
        address(offsets),
        temperature,
        top_k,
        top_p,
        min_p,
        address(codes),
        address(logprob),
        address(logprob_full),
        address(entropy),
        rows,
        num_codes,
        max(logits.stride(0), num_codes),
        threads(),
    )
    return codes, logprob, logprob_full, entropy


def sample_codes_cuda(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seeds: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``sample_codes``, for CUDA tensors: one launch on torch's current stream, no host sync.

    ``seeds`` and ``offsets`` are read on the device, so a captured graph can be reseeded by writing
    into them. K is at most ``MAX_CUDA_CODES``; RuntimeError when this build has no CUDA.
    """
    if not _C.has_cuda:
        raise RuntimeError("sample_codes: this build of latent_rl._C has no CUDA kernels")
    if logits.shape[1] > MAX_CUDA_CODES:
        raise ValueError(
            f"sample_codes: the CUDA kernel takes at most {MAX_CUDA_CODES} codes, "
            f"got {logits.shape[1]}"
        )
    logits, seeds, offsets = rows_of(logits), seeds.contiguous(), offsets.contiguous()
    with torch.cuda.device(logits.device):
        codes, logprob, logprob_full, entropy = _outputs(logits, seeds)
        _C.sample_codes_cuda(
            dtype_code("sample_codes", logits),
            address(logits),
            address(seeds),
            address(offsets),
            temperature,
            top_k,
            top_p,
            min_p,
            address(codes),
            address(logprob),
            address(logprob_full),
            address(entropy),
            logits.shape[0],
            logits.shape[1],
            max(logits.stride(0), logits.shape[1]),
            torch.cuda.current_stream(logits.device).cuda_stream,
        )
    return codes, logprob, logprob_full, entropy


def _outputs(logits: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Cheaper than naming shape, dtype and device: this runs once per decoded token.
    codes = torch.empty_like(seeds)
    logprob = torch.empty_like(codes, dtype=accumulator(logits.dtype))
    return codes, logprob, torch.empty_like(logprob), torch.empty_like(logprob)
