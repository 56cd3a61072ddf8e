"""Reference of gumbel_quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl.reference.philox import gumbel_noise


def _valid_rows(logits: Tensor) -> Tensor:
    """Rows that define a distribution: no NaN or +inf, and at least one code not masked."""
    broken = logits.isnan() | (logits == torch.inf)
    return ~broken.any(-1) & (logits > -torch.inf).any(-1)


def _noisy(logits: Tensor, seeds: Tensor) -> Tensor:
    return logits.double() + gumbel_noise(seeds, torch.zeros_like(seeds), logits.shape[-1])


def gumbel_quantize_forward(
    logits: Tensor, codebook: Tensor, tau: float, seeds: Tensor, hard: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw a code per row by the Gumbel-max trick and look its vector up.

    Args:
        logits: [N, K]; -inf masks a code.
        codebook: [K, D].
        tau: temperature of the relaxation, > 0.
        seeds: int64 [N].
        hard: vectors are codebook[codes]; else softmax((logits + G) / tau) @ codebook.

    Returns:
        codes int64 [N] (-1 for rows without a distribution); vectors [N, D] in the codebook's
        dtype; entropy [N] of softmax(logits) in nats; mean_probs [K], the mean of softmax(logits)
        over valid rows; counts int64 [K].
    """
    accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
    valid = _valid_rows(logits)
    clean = torch.where(valid[:, None], logits, 0)
    scores = _noisy(clean, seeds)
    codes = scores.argmax(-1)
    if hard:
        vectors = codebook[codes]
    else:
        vectors = ((scores / tau).softmax(-1) @ codebook.double()).to(codebook.dtype)
    probs = clean.double().softmax(-1)
    entropy = torch.special.entr(probs).sum(-1)
    mean_probs = probs[valid].sum(0) / max(int(valid.sum()), 1)
    counts = torch.bincount(codes[valid], minlength=len(codebook))
    return (
        torch.where(valid, codes, -1),
        vectors.masked_fill(~valid[:, None], torch.nan),
        entropy.masked_fill(~valid, torch.nan).to(accumulator),
        mean_probs.to(accumulator),
        counts,
    )


def gumbel_quantize_backward(
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
    """Gradients of logits [N, K] and codebook [K, D]; the noise comes again from the seeds.

    With y = softmax((logits + G) / tau) the logits get the gradient of y @ codebook whether or not
    the forward was hard (straight-through); the codebook gets that of the forward itself. Rows
    with code -1 get zero.
    """
    valid = (codes >= 0)[:, None]
    clean = torch.where(valid, logits, 0).double()
    g_vectors = torch.where(valid, grad_vectors, 0).double()
    g_entropy = torch.where(valid, grad_entropy[:, None], 0).double()
    y = (_noisy(clean, seeds) / tau).softmax(-1)
    dy = g_vectors @ codebook.double().T
    dlogits = y * (dy - (y * dy).sum(-1, keepdim=True)) / tau
    probs = clean.softmax(-1)
    log_probs = torch.where(probs > 0, probs, 1).log()
    entropy = -(probs * log_probs).sum(-1, keepdim=True)
    dlogits -= g_entropy * probs * (log_probs + entropy)
    g_mean = grad_mean_probs.double()[None] / max(int(valid.sum()), 1)
    dlogits += probs * (g_mean - (probs * g_mean).sum(-1, keepdim=True))
    if hard:
        weights = torch.nn.functional.one_hot(codes.clamp(min=0), len(codebook)).double()
    else:
        weights = y
    dcodebook = (weights * valid).T @ g_vectors
    return torch.where(valid, dlogits, 0).to(logits.dtype), dcodebook.to(codebook.dtype)
