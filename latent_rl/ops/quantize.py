"""quantize: one vector-quantization step with straight-through gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from latent_rl.ops import _checks
from latent_rl.ops._library import accumulator, define, differentiable

__all__ = ["QuantizeOutput", "quantize"]

OP = "quantize"


class QuantizeOutput(NamedTuple):
    """What ``quantize`` returns.

    Attributes:
        quantized: [N, D], values codebook[codes]; its gradient goes straight through to x.
        codes: int64 [N], -1 for rows that are not finite (their ``quantized`` row is NaN).
        commitment_loss: mean over valid rows and D of (x - sg(c))^2; gradient to x only.
        codebook_loss: mean over valid rows and D of (sg(x) - c)^2; gradient to codebook only.
        counts: int64 [K], rows per code.
        sums: [K, D], sum of the rows of each code; with ``counts`` what an EMA update needs.
        perplexity: scalar, exp of the entropy of the codes in this batch.
    """

    quantized: Tensor
    codes: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    counts: Tensor
    sums: Tensor
    perplexity: Tensor


def _forward_fake(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, ...]:
    wide = accumulator(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:1], dtype=torch.int64),
        x.new_empty((), dtype=wide),
        x.new_empty((), dtype=wide),
        x.new_empty(codebook.shape[:1], dtype=torch.int64),
        x.new_empty(codebook.shape, dtype=wide),
        x.new_empty((), dtype=wide),
    )


def _backward_fake(
    grad_quantized: Tensor,
    grad_commitment: Tensor,
    grad_codebook_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    counts: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape)


def _two_losses(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One mean squared error serves two losses that differ only in their gradients."""
    codes, quantized, error, counts, sums, perplexity = result
    return quantized, codes, error, error.clone(), counts, sums, perplexity


define(
    OP,
    "quantize_forward",
    "(Tensor x, Tensor codebook, str metric)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    finish=_two_losses,
)
define(
    OP,
    "quantize_backward",
    "(Tensor grad_quantized, Tensor grad_commitment, Tensor grad_codebook_loss, Tensor x,"
    " Tensor codebook, Tensor codes, Tensor counts, Tensor sums) -> (Tensor, Tensor)",
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebook, _ = inputs
    _, codes, _, _, counts, sums, perplexity = output
    ctx.save_for_backward(x, codebook, codes, counts, sums)
    ctx.mark_non_differentiable(codes, counts, sums, perplexity)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_quantized, _, grad_commitment, grad_codebook_loss, *_ = grads
    dx, dcodebook = torch.ops.latent_rl.quantize_backward(
        grad_quantized, grad_commitment, grad_codebook_loss, *ctx.saved_tensors
    )
    return dx, dcodebook, None


differentiable("quantize_forward", _backward, _setup)


def quantize(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> QuantizeOutput:
    """Replace every row by its nearest code, with what training the codebook needs.

    ``q = x + sg(c - x)`` with ``c = codebook[nearest_code(x)]`` (van den Oord et al., "Neural
    Discrete Representation Learning", 2017, equations 1 to 3). The usual loss is
    ``codebook_loss + beta * commitment_loss``, or the second term alone with an EMA codebook.

    Args:
        x: [N, D]; float32, bfloat16, float16 or float64; any strides.
        codebook: [K, D], same dtype and device.
        metric: as in :func:`nearest_code`.

    Returns:
        :class:`QuantizeOutput`; losses and statistics are float32 (float64 for float64 input),
        accumulated at least that wide. Deterministic. Rows that are not finite take no part in
        losses or statistics and receive no gradient.

    Raises:
        TypeError: for dtypes. ValueError: for shapes, devices, K = 0 or an unknown metric.
    """
    _checks.check_float(OP, "x", x)
    _checks.check_ndim(OP, "x", x, 2, "[N, D]")
    _checks.check_float(OP, "codebook", codebook)
    _checks.check_ndim(OP, "codebook", codebook, 2, "[K, D]")
    _checks.check_codebook(OP, codebook)
    _checks.check_like(OP, "codebook", codebook, "x", x)
    _checks.check_metric(OP, metric)
    if codebook.shape[1] != x.shape[1]:
        raise ValueError(
            f"{OP}: codebook.shape[-1] must equal x.shape[-1] ({x.shape[1]}), "
            f"got {codebook.shape[1]}"
        )
    return QuantizeOutput(*torch.ops.latent_rl.quantize_forward(x, codebook, metric))
