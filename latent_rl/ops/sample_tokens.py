"""sample_tokens: draw one token per row from a vocabulary, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl.ops import _checks
from latent_rl.ops._library import define
from latent_rl.ops.sample_codes import offsets_of
from latent_rl.ops.seeds import row_seeds

__all__ = ["sample_tokens"]

OP = "sample_tokens"


def _fake(logits: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


define(OP, OP, "(Tensor logits, Tensor seeds, Tensor offsets) -> Tensor", _fake)


def sample_tokens(logits: Tensor, *, seed: int | Tensor, offset: int | Tensor = 0) -> Tensor:
    """Draw a token per row: ``argmax_k logits_k + G_k``, one pass over the logits.

    The codes of ``sample_codes`` at temperature 1 without truncation, bit for bit on every backend,
    for a vocabulary of any size and without log-probabilities.

    Args:
        logits: [B, V]; float32, bfloat16, float16 or float64; -inf masks a token.
        seed: int, int64 scalar tensor, or int64 [B] with one seed per row.
        offset: int, or int64 scalar or [B] tensor: the step. As a tensor it stays on the device,
            so that replays of a captured graph can draw anew.

    Returns:
        int64 [B]; -1 for a row with NaN or +inf, or with -inf alone. Not differentiable.

    Raises:
        TypeError: for dtypes. ValueError: for shapes or V = 0.
    """
    _checks.check_float(OP, "logits", logits)
    _checks.check_ndim(OP, "logits", logits, 2, "[B, V]")
    if logits.shape[1] == 0:
        raise ValueError(f"{OP}: logits must have at least one token, got V = 0")
    rows, device = logits.shape[0], logits.device
    seeds = row_seeds(seed, rows, device)
    tokens: Tensor = torch.ops.latent_rl.sample_tokens(
        logits.detach(), seeds, offsets_of(OP, offset, rows, device)
    )
    return tokens
