"""Reference of sample_tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl.reference.philox import gumbel_noise


def sample_tokens(logits: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    """Draw one token per row by the Gumbel-max trick from softmax(logits).

    Args:
        logits: [B, V]; -inf masks a token.
        seeds, offsets: int64 [B].

    Returns:
        int64 [B], the codes of ``sample_codes`` without truncation at temperature 1. A row with NaN
        or +inf, or without a token left, gives -1.
    """
    broken = (logits.isnan() | (logits == torch.inf)).any(-1)
    valid = ~broken & (logits > -torch.inf).any(-1)
    exact = torch.where(valid[:, None], logits, 0).double()
    tokens = (exact + gumbel_noise(seeds, offsets, logits.shape[-1])).argmax(-1)
    return torch.where(valid, tokens, -1)
