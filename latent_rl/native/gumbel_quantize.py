"""C++ backend of gumbel_quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import accumulator, address, dtype_code, empty, rows_of, threads
from latent_rl.native._segments import segment_sum

__all__ = ["gumbel_quantize_backward", "gumbel_quantize_forward"]

# Elements of [rows, K] the backward holds at a time: 8 MiB in float32, which a third-level cache
# keeps between the product that writes them and the pass that reads them.
_CHUNK_ELEMENTS = 1 << 21


def gumbel_quantize_forward(
    logits: Tensor, codebook: Tensor, tau: float, seeds: Tensor, hard: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw a code per row by the Gumbel-max trick and look its vector up.

    Args:
        logits: [N, K] on the CPU, any strides; -inf masks a code.
        codebook: [K, D].
        tau: temperature of the relaxation, > 0.
        seeds: int64 [N].
        hard: vectors are codebook[codes]; else softmax((logits + G) / tau) @ codebook.

    Returns:
        codes int64 [N] (-1 for rows without a distribution); vectors [N, D] in the codebook's
        dtype (NaN rows for -1); entropy [N] of softmax(logits) in nats; mean_probs [K], the mean of
        softmax(logits) over valid rows; counts int64 [K]. Bitwise the same for any thread count.
    """
    rows, num_codes = logits.shape
    codebook = codebook.contiguous()
    logits, seeds = rows_of(logits), seeds.contiguous()
    acc = accumulator(logits.dtype)
    codes = torch.empty(rows, dtype=torch.int64)
    entropy = torch.empty(rows, dtype=acc)
    mean_probs = torch.empty(num_codes, dtype=acc)
    counts = torch.empty(num_codes, dtype=torch.int64)
    soft = None if hard else empty((rows, num_codes), acc)
    _C.gumbel_forward(
        dtype_code("gumbel_quantize", logits),
        address(logits),
        address(seeds),
        tau,
        address(codes),
        address(entropy),
        address(mean_probs),
        address(counts),
        address(soft),
        rows,
        num_codes,
        max(logits.stride(0), num_codes),
        threads(),
    )
    if soft is None:
        vectors = _lookup(codebook, codes)
    else:
        wide = torch.promote_types(acc, codebook.dtype)
        vectors = (soft.to(wide) @ codebook.to(wide)).to(codebook.dtype)
    return codes, vectors, entropy, mean_probs, counts


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
    with code -1 get zero. Works on chunks of rows: no [N, K] matrix but the result is held.
    """
    rows, num_codes = logits.shape
    codebook = codebook.contiguous()
    logits, seeds, codes = rows_of(logits), seeds.contiguous(), codes.contiguous()
    acc = accumulator(logits.dtype)
    invalid = codes < 0
    valid_rows = rows - int(invalid.sum())
    grad = grad_vectors.to(acc)
    if valid_rows < rows:
        grad = grad.masked_fill(invalid[:, None], 0.0)
    table = codebook.to(acc)
    g_entropy = grad_entropy.to(acc).contiguous()
    g_mean = grad_mean_probs.to(acc).contiguous()
    dlogits = empty((rows, num_codes), logits.dtype)
    dcodebook = torch.zeros_like(table)
    step = max(_CHUNK_ELEMENTS // num_codes, 1)
    buffer = torch.empty((min(step, rows), num_codes), dtype=acc)
    for begin in range(0, rows, step):
        chunk = slice(begin, min(begin + step, rows))
        part = logits[chunk]
        g_soft = torch.mm(grad[chunk], table.T, out=buffer[: len(part)])
        soft = None if hard else torch.empty_like(g_soft)
        _C.gumbel_backward(
            dtype_code("gumbel_quantize", logits),
            address(part),
            address(seeds[chunk]),
            address(codes[chunk]),
            address(g_soft),
            address(g_entropy[chunk]),
            address(g_mean),
            tau,
            valid_rows,
            address(dlogits[chunk]),
            address(soft),
            part.shape[0],
            num_codes,
            max(logits.stride(0), num_codes),
            threads(),
        )
        if soft is not None:
            dcodebook.addmm_(soft.T, grad[chunk])
    if hard:
        dcodebook = segment_sum(grad, codes, num_codes)
    return dlogits, dcodebook.to(codebook.dtype)


def _lookup(codebook: Tensor, codes: Tensor) -> Tensor:
    """Rows of the codebook; NaN rows for code -1, without touching the others twice."""
    invalid = codes < 0
    broken = bool(invalid.any())
    vectors = empty((len(codes), codebook.shape[1]), codebook.dtype)
    torch.index_select(codebook, 0, codes.clamp(min=0) if broken else codes, out=vectors)
    return vectors.masked_fill_(invalid[:, None], torch.nan) if broken else vectors
