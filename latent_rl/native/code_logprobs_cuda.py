"""CUDA backend of code_logprobs: one launch forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import address, dtype_code, rows_of
from latent_rl.native._segments_cuda import current_stream

__all__ = ["code_logprobs_backward_cuda", "code_logprobs_forward_cuda"]


def code_logprobs_forward_cuda(
    logits: Tensor, codes: Tensor, ref_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the codes, entropy, and exact KL(softmax(logits) || softmax(ref)).

    As ``latent_rl.native.code_logprobs.code_logprobs_forward``, for CUDA tensors of float32,
    bfloat16 or float16: float32 inside, on torch's current stream, no host sync.
    """
    rows, num_codes = logits.shape
    with torch.cuda.device(logits.device):
        logits, codes, ref_logits = _prepared(logits, codes, ref_logits)
        out = [torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3)]
        _C.logprobs_forward_cuda(
            dtype_code("code_logprobs", logits),
            address(logits),
            address(ref_logits),
            address(codes),
            address(out[0]),
            address(out[1]),
            address(out[2]),
            rows,
            num_codes,
            _row_stride(logits),
            _row_stride(ref_logits),
            current_stream(logits),
        )
    return out[0], out[1], out[2]


def code_logprobs_backward_cuda(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    codes: Tensor,
    ref_logits: Tensor | None,
) -> Tensor:
    """Gradient of logits [N, K]; the reference gets none, invalid rows get zero.

    As ``latent_rl.native.code_logprobs.code_logprobs_backward``; the row's sums are computed anew,
    so that nothing is saved between the passes.
    """
    rows, num_codes = logits.shape
    with torch.cuda.device(logits.device):
        logits, codes, ref_logits = _prepared(logits, codes, ref_logits)
        # Gradients of a sum arrive as one number expanded.
        grads = [g.to(torch.float32).contiguous() for g in (grad_logprob, grad_entropy, grad_kl)]
        dlogits = torch.empty((rows, num_codes), dtype=logits.dtype, device=logits.device)
        _C.logprobs_backward_cuda(
            dtype_code("code_logprobs", logits),
            address(logits),
            address(ref_logits),
            address(codes),
            address(grads[0]),
            address(grads[1]),
            address(grads[2]),
            address(dlogits),
            rows,
            num_codes,
            _row_stride(logits),
            _row_stride(ref_logits),
            current_stream(logits),
        )
    return dlogits


def _prepared(
    logits: Tensor, codes: Tensor, ref_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if ref_logits is not None:
        ref_logits = rows_of(ref_logits.to(logits.dtype))
    return rows_of(logits), codes.contiguous(), ref_logits


def _row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else max(matrix.stride(0), matrix.shape[1])
