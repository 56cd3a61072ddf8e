"""Reference of quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl.reference.nearest_code import nearest_code


def quantize_forward(
    x: Tensor, codebook: Tensor, metric: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Vector quantization of rows.

    Args:
        x: [N, D].
        codebook: [K, D].
        metric: as in ``nearest_code``.

    Returns:
        codes int64 [N] (-1 where the row is not finite); quantized [N, D] = codebook[codes] (NaN
        rows for -1); mean squared error over valid rows and D; counts int64 [K]; sums [K, D] of
        the rows of each code; perplexity exp(H(counts / total)). Floats but ``quantized`` are
        float64 for float64 input and float32 otherwise. Without valid rows the error is 0 and the
        perplexity 1.
    """
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    codes = nearest_code(x[None], codebook[None], metric)[0][0]
    valid = codes >= 0
    quantized = codebook[codes.clamp(min=0)].masked_fill(~valid[:, None], torch.nan)
    rows, chosen, kept = x[valid].double(), codebook[codes[valid]].double(), codes[valid]
    error = (rows - chosen).square().sum() / max(rows.numel(), 1)
    one_hot = torch.nn.functional.one_hot(kept, len(codebook)).double()
    counts = one_hot.sum(0).long()
    sums = one_hot.T @ rows
    usage = counts.double() / max(int(valid.sum()), 1)
    perplexity = torch.special.entr(usage).sum().exp()
    return (
        codes,
        quantized,
        error.to(accumulator),
        counts,
        sums.to(accumulator),
        perplexity.to(accumulator),
    )


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
    valid = codes >= 0
    elements = max(int(valid.sum()) * x.shape[1], 1)
    pull = (x.double() - codebook[codes.clamp(min=0)].double()) * 2 / elements
    dx = grad_quantized.double() + grad_commitment.double() * pull
    dx = torch.where(valid[:, None], dx, 0)
    used = counts[:, None].double() * codebook.double() - sums.double()
    # A code that is not finite is never chosen: 0 * inf must not become its gradient.
    used = torch.where(counts[:, None] > 0, used, 0)
    dcodebook = grad_codebook_loss.double() * used * 2 / elements
    return dx.to(x.dtype), dcodebook.to(codebook.dtype)
