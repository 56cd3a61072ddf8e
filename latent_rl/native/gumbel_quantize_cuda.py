"""CUDA backend of gumbel_quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import address, dtype_code, rows_of
from latent_rl.native._segments_cuda import current_stream, group_rows, segment_sum

__all__ = ["MAX_CODES", "gumbel_quantize_backward_cuda", "gumbel_quantize_forward_cuda"]

MAX_CODES = 8192

# Elements of [rows, K] the backward holds at a time: what a second-level cache keeps.
_CHUNK_ELEMENTS = 1 << 23


def _check_codes(num_codes: int) -> None:
    if num_codes > MAX_CODES:
        raise ValueError(
            f"gumbel_quantize: the CUDA kernels take at most {MAX_CODES} codes, got {num_codes}"
        )


def gumbel_quantize_forward_cuda(
    logits: Tensor, codebook: Tensor, tau: float, seeds: Tensor, hard: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw a code per row by the Gumbel-max trick and look its vector up.

    As ``latent_rl.native.gumbel_quantize.gumbel_quantize_forward``, for CUDA tensors of float32,
    bfloat16 or float16 and at most ``MAX_CODES`` codes: on torch's current stream, no host sync.
    ``seeds`` are read on the device, so a captured graph can be reseeded by writing into them.
    """
    rows, num_codes = logits.shape
    dim, device = codebook.shape[1], logits.device
    _check_codes(num_codes)
    with torch.cuda.device(device):
        logits, seeds, codebook = rows_of(logits), seeds.contiguous(), codebook.contiguous()
        codes = torch.empty(rows, dtype=torch.int64, device=device)
        entropy = torch.empty(rows, dtype=torch.float32, device=device)
        mean_probs = torch.empty(num_codes, dtype=torch.float32, device=device)
        counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
        teams = _C.gumbel_teams(rows, num_codes)
        partials = torch.empty((teams, num_codes), dtype=torch.float32, device=device)
        valid = torch.empty(teams, dtype=torch.int32, device=device)
        vectors = torch.empty((rows, dim), dtype=codebook.dtype, device=device)
        soft = None if hard else torch.empty((rows, num_codes), dtype=logits.dtype, device=device)
        _C.gumbel_forward_cuda(
            dtype_code("gumbel_quantize", logits),
            address(logits),
            address(seeds),
            address(codebook),
            tau,
            address(codes),
            address(vectors if hard else None),
            address(entropy),
            address(mean_probs),
            address(counts),
            address(soft),
            address(partials),
            address(valid),
            rows,
            num_codes,
            dim,
            max(logits.stride(0), num_codes),
            current_stream(logits),
        )
        if soft is not None:
            torch.mm(soft, codebook, out=vectors)
    return codes, vectors, entropy, mean_probs, counts


def gumbel_quantize_backward_cuda(
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

    As ``latent_rl.native.gumbel_quantize.gumbel_quantize_backward``. The gradient of the relaxed
    one-hot is a matrix product in the logits' dtype, of as many rows at a time as stay in the
    second-level cache; no [N, K] matrix but the result is held.
    """
    rows, num_codes = logits.shape
    dtype, device = logits.dtype, logits.device
    _check_codes(num_codes)
    with torch.cuda.device(device):
        logits, seeds, codes = rows_of(logits), seeds.contiguous(), codes.contiguous()
        # The rows without a code may carry NaN, which must not reach the codebook.
        grad = grad_vectors.to(dtype).masked_fill((codes < 0)[:, None], 0.0)
        g_entropy = grad_entropy.to(torch.float32).contiguous()
        g_mean = grad_mean_probs.to(torch.float32).contiguous()
        valid_rows = (codes >= 0).sum()
        dlogits = torch.empty((rows, num_codes), dtype=dtype, device=device)
        dcodebook = torch.zeros(codebook.shape, dtype=torch.float32, device=device)
        step = max(_CHUNK_ELEMENTS // num_codes, 1)
        for begin in range(0, rows, step):
            chunk = slice(begin, min(begin + step, rows))
            part = logits[chunk]
            g_soft = grad[chunk] @ codebook.T
            soft = None if hard else torch.empty_like(g_soft)
            _C.gumbel_backward_cuda(
                dtype_code("gumbel_quantize", logits),
                address(part),
                address(seeds[chunk]),
                address(codes[chunk]),
                address(g_soft),
                address(g_entropy[chunk]),
                address(g_mean),
                address(valid_rows),
                tau,
                address(dlogits[chunk]),
                address(soft),
                part.shape[0],
                num_codes,
                max(logits.stride(0), num_codes),
                current_stream(logits),
            )
            if soft is not None:
                dcodebook += soft.T.float() @ grad[chunk].float()
        if hard:
            dcodebook = segment_sum(grad, group_rows(codes, num_codes))
    return dlogits, dcodebook.to(codebook.dtype)
