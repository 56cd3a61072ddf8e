"""C++ and CUDA backends of sample_tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import address, dtype_code, rows_of
from latent_rl.native.sample_codes import sample_codes

__all__ = ["sample_tokens", "sample_tokens_cuda"]


def sample_tokens(logits: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    """Draw one token per row by the Gumbel-max trick from softmax(logits).

    Args:
        logits: [B, V] on the CPU, any strides; -inf masks a token.
        seeds, offsets: int64 [B].

    Returns:
        int64 [B]; -1 for a row with NaN or +inf, or without a token left.
    """
    return sample_codes(logits, 1.0, 0, 1.0, 0.0, seeds, offsets)[0]


def sample_tokens_cuda(logits: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    """As ``sample_tokens``, for CUDA tensors of any V: one pass over the logits, no host sync.

    Two launches on torch's current stream; ``seeds`` and ``offsets`` are read on the device.
    RuntimeError when this build has no CUDA.
    """
    if not _C.has_cuda:
        raise RuntimeError("sample_tokens: this build of latent_rl._C has no CUDA kernels")
    logits, seeds, offsets = rows_of(logits), seeds.contiguous(), offsets.contiguous()
    rows, num_tokens = logits.shape
    device = logits.device
    with torch.cuda.device(device):
        tokens = torch.empty(rows, dtype=torch.int64, device=device)
        parts = torch.empty(
            _C.sample_tokens_workspace(rows, num_tokens) * _C.TOKEN_PART_BYTES // 8,
            dtype=torch.float64,
            device=device,
        )
        _C.sample_tokens_cuda(
            dtype_code("sample_tokens", logits),
            address(logits),
            address(seeds),
            address(offsets),
            address(tokens),
            address(parts),
            rows,
            num_tokens,
            max(logits.stride(0), num_tokens),
            torch.cuda.current_stream(device).cuda_stream,
        )
    return tokens
