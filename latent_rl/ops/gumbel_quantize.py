"""gumbel_quantize: the paper's straight-through quantizer over code logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from latent_rl.ops import _checks
from latent_rl.ops._library import accumulator, define, differentiable
from latent_rl.ops.seeds import row_seeds

__all__ = ["GumbelQuantizeOutput", "gumbel_quantize"]

OP = "gumbel_quantize"


class GumbelQuantizeOutput(NamedTuple):
    """What ``gumbel_quantize`` returns.

    Attributes:
        vectors: [N, D] in the codebook's dtype; NaN rows where the code is -1.
        codes: int64 [N], -1 for rows that define no distribution.
        entropy: [N], entropy of softmax(logits) in nats (without noise), differentiable.
        mean_probs: [K], mean of softmax(logits) over valid rows, differentiable; its entropy is
            the batch-marginal regulariser against collapse.
        counts: int64 [K], rows per code.
    """

    vectors: Tensor
    codes: Tensor
    entropy: Tensor
    mean_probs: Tensor
    counts: Tensor


def _forward_fake(
    logits: Tensor, codebook: Tensor, tau: float, seeds: Tensor, hard: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator(logits)
    n, num_codes = logits.shape
    return (
        codebook.new_empty((n, codebook.shape[1])),
        logits.new_empty((n,), dtype=torch.int64),
        logits.new_empty((n,), dtype=wide),
        logits.new_empty((num_codes,), dtype=wide),
        logits.new_empty((num_codes,), dtype=torch.int64),
    )


def _backward_fake(
    grad_vectors: Tensor,
    grad_entropy: Tensor,
    grad_mean_probs: Tensor,
    logits: Tensor,
    codebook: Tensor,
    tau: float,
    seeds: Tensor,
    hard: bool,
    codes: Tensor,
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), codebook.new_empty(codebook.shape)


define(
    OP,
    "gumbel_quantize_forward",
    "(Tensor logits, Tensor codebook, float tau, Tensor seeds, bool hard)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    finish=lambda result: (result[1], result[0], *result[2:]),
)
define(
    OP,
    "gumbel_quantize_backward",
    "(Tensor grad_vectors, Tensor grad_entropy, Tensor grad_mean_probs, Tensor logits,"
    " Tensor codebook, float tau, Tensor seeds, bool hard, Tensor codes) -> (Tensor, Tensor)",
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, codebook, ctx.tau, seeds, ctx.hard = inputs
    _, codes, _, _, counts = output
    # Logits and seeds only: the noise is drawn again in the backward.
    ctx.save_for_backward(logits, codebook, seeds, codes)
    ctx.mark_non_differentiable(codes, counts)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    grad_vectors, _, grad_entropy, grad_mean_probs, _ = grads
    logits, codebook, seeds, codes = ctx.saved_tensors
    dlogits, dcodebook = torch.ops.latent_rl.gumbel_quantize_backward(
        grad_vectors,
        grad_entropy,
        grad_mean_probs,
        logits,
        codebook,
        ctx.tau,
        seeds,
        ctx.hard,
        codes,
    )
    return dlogits, dcodebook, None, None, None


differentiable("gumbel_quantize_forward", _backward, _setup)


def gumbel_quantize(
    logits: Tensor,
    codebook: Tensor,
    *,
    tau: float = 1.0,
    seed: int | Tensor,
    hard: bool = True,
) -> GumbelQuantizeOutput:
    """Draw a code per row by the Gumbel-max trick; differentiate its softmax relaxation.

    ``y = softmax((logits + G) / tau)``. With ``hard`` the vectors are ``codebook[argmax y]`` and
    the logits receive the gradient of ``y @ codebook`` (straight-through; Jang et al.,
    "Categorical Reparameterization with Gumbel-Softmax", 2017); otherwise the vectors are
    ``y @ codebook``. Nothing of size N x K is saved: the backward draws the noise again.

    Args:
        logits: [N, K]; float32, bfloat16, float16 or float64; -inf masks a code.
        codebook: [K, D], same dtype and device.
        tau: temperature of the relaxation, > 0 (the paper: 2.0).
        seed: int, int64 scalar tensor, or int64 [N] with one seed per row; the same seed gives
            the same codes on every backend and in every batch.
        hard: return codebook rows rather than mixtures.

    Returns:
        :class:`GumbelQuantizeOutput`.

    Raises:
        TypeError: for dtypes. ValueError: for shapes, devices, K = 0 or tau <= 0.
    """
    _checks.check_float(OP, "logits", logits)
    _checks.check_ndim(OP, "logits", logits, 2, "[N, K]")
    _checks.check_float(OP, "codebook", codebook)
    _checks.check_ndim(OP, "codebook", codebook, 2, "[K, D]")
    _checks.check_codebook(OP, codebook)
    _checks.check_like(OP, "codebook", codebook, "logits", logits)
    if codebook.shape[0] != logits.shape[1]:
        raise ValueError(
            f"{OP}: codebook.shape[0] must equal logits.shape[-1] ({logits.shape[1]}), "
            f"got {codebook.shape[0]}"
        )
    if not tau > 0:
        raise ValueError(f"{OP}: tau must be positive, got {tau}")
    seeds = row_seeds(seed, logits.shape[0], logits.device)
    return GumbelQuantizeOutput(
        *torch.ops.latent_rl.gumbel_quantize_forward(logits, codebook, float(tau), seeds, hard)
    )
