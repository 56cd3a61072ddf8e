"""code_logprobs: log-probability, entropy and exact KL over the codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from latent_rl.ops import _checks
from latent_rl.ops._library import accumulator, define, differentiable

__all__ = ["CodeLogprobsOutput", "code_logprobs"]

OP = "code_logprobs"


class CodeLogprobsOutput(NamedTuple):
    """What ``code_logprobs`` returns; all in nats, differentiable with respect to ``logits``.

    Attributes:
        logprob: [...], of the codes under softmax(logits).
        entropy: [...], of softmax(logits).
        kl: [...], KL(softmax(logits) || softmax(ref_logits)), exact; zeros without a reference.
    """

    logprob: Tensor
    entropy: Tensor
    kl: Tensor


def _forward_fake(
    logits: Tensor, codes: Tensor, ref_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide = logits.shape[:1], accumulator(logits)
    return (
        logits.new_empty(rows, dtype=wide),
        logits.new_empty(rows, dtype=wide),
        logits.new_empty(rows, dtype=wide),
    )


def _backward_fake(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    codes: Tensor,
    ref_logits: Tensor | None,
) -> Tensor:
    return logits.new_empty(logits.shape)


define(
    OP,
    "code_logprobs_forward",
    "(Tensor logits, Tensor codes, Tensor? ref_logits) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
define(
    OP,
    "code_logprobs_backward",
    "(Tensor grad_logprob, Tensor grad_entropy, Tensor grad_kl, Tensor logits, Tensor codes,"
    " Tensor? ref_logits) -> Tensor",
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.latent_rl.code_logprobs_backward(*grads, *ctx.saved_tensors), None, None


differentiable("code_logprobs_forward", _backward, _setup)


def code_logprobs(
    logits: Tensor, codes: Tensor, ref_logits: Tensor | None = None
) -> CodeLogprobsOutput:
    """Score codes under a policy: log-probability, entropy, exact KL to a reference.

    K is small, so ``KL = sum_k p_k (log p_k - log q_k)`` needs no estimator.

    Args:
        logits: [..., K]; float32, bfloat16, float16 or float64; -inf masks a code. Divide by the
            temperature beforehand to score a tempered policy.
        codes: int64 [...], in [-1, K); -1 gives NaN and no gradient.
        ref_logits: [..., K], same dtype and device, or None; receives no gradient.

    Returns:
        :class:`CodeLogprobsOutput`, float32 (float64 for float64 input).

    Raises:
        TypeError: for dtypes. ValueError: for shapes, devices or code range (checked on the CPU).
    """
    _checks.check_float(OP, "logits", logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{OP}: logits must have shape [..., K], got {list(logits.shape)}")
    _checks.check_codes(OP, "codes", codes)
    _checks.check_shape(OP, "codes", codes, logits.shape[:-1])
    _checks.check_device(OP, "codes", codes, "logits", logits)
    _checks.check_code_range(OP, "codes", codes, logits.shape[-1])
    flat_ref = None
    if ref_logits is not None:
        _checks.check_float(OP, "ref_logits", ref_logits)
        _checks.check_like(OP, "ref_logits", ref_logits, "logits", logits)
        _checks.check_shape(OP, "ref_logits", ref_logits, logits.shape)
        flat_ref = ref_logits.detach()
    # A view costs about 1 us, and six of them as much as 60 rows.
    if logits.ndim == 2:
        out = torch.ops.latent_rl.code_logprobs_forward(logits, codes, flat_ref)
        return CodeLogprobsOutput(*out)
    num_codes = logits.shape[-1]
    if flat_ref is not None:
        flat_ref = flat_ref.reshape(-1, num_codes)
    out = torch.ops.latent_rl.code_logprobs_forward(
        logits.reshape(-1, num_codes), codes.reshape(-1), flat_ref
    )
    return CodeLogprobsOutput(*(value.reshape(codes.shape) for value in out))
