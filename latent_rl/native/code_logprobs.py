"""C++ backend of code_logprobs."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import accumulator, address, dtype_code, empty, rows_of, threads

__all__ = ["code_logprobs_backward", "code_logprobs_forward"]


def code_logprobs_forward(
    logits: Tensor, codes: Tensor, ref_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the codes, entropy, and exact KL(softmax(logits) || softmax(ref)).

    Args:
        logits: [N, K] on the CPU, any strides; -inf masks a code. codes: int64 [N].
        ref_logits: [N, K] or None.

    Returns:
        logprob [N], entropy [N] in nats, kl [N] in nats (zeros without ``ref_logits``). Rows with
        code -1 or without a distribution give NaN.
    """
    rows, num_codes = logits.shape
    logits, codes, ref_logits = _prepared(logits, codes, ref_logits)
    logprob = torch.empty(rows, dtype=accumulator(logits.dtype))
    entropy, kl = torch.empty_like(logprob), torch.empty_like(logprob)
    _C.logprobs_forward(
        dtype_code("code_logprobs", logits),
        address(logits),
        address(ref_logits),
        address(codes),
        address(logprob),
        address(entropy),
        address(kl),
        rows,
        num_codes,
        _row_stride(logits),
        _row_stride(ref_logits),
        threads(),
    )
    return logprob, entropy, kl


def code_logprobs_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    codes: Tensor,
    ref_logits: Tensor | None,
) -> Tensor:
    """Gradient of logits [N, K]; the reference gets none, invalid rows get zero.

    d logprob = onehot - p; d entropy = -p (log p + H); d kl = p (log p - log q - KL).
    """
    rows, num_codes = logits.shape
    logits, codes, ref_logits = _prepared(logits, codes, ref_logits)
    acc = accumulator(logits.dtype)
    grads = [
        (g if g.dtype == acc else g.to(acc)).contiguous()
        for g in (grad_logprob, grad_entropy, grad_kl)
    ]
    dlogits = empty((rows, num_codes), logits.dtype)
    _C.logprobs_backward(
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
        threads(),
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
