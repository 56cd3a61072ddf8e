"""How much of the codebook is in use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CodeUsage:
    """Use of a codebook of K codes over a set of actions.

    Attributes:
        perplexity: exp of the entropy of the empirical code distribution; 1 (collapse) to K.
        used: number of codes that occurred.
        share: ``used / K``.
        counts: int64 [K], occurrences of each code.
    """

    perplexity: float
    used: int
    share: float
    counts: Tensor


def code_usage(codes: Tensor, num_codes: int) -> CodeUsage:
    """Usage of ``codes`` (int64, any shape; negative entries mark masked positions).

    Raises:
        ValueError: when a code is out of range or none is left after masking.
    """
    flat = codes.reshape(-1)
    flat = flat[flat >= 0]
    if not flat.numel():
        raise ValueError("code_usage: codes holds no code that is not masked")
    if int(flat.max()) >= num_codes:
        raise ValueError(
            f"code_usage: codes must be below num_codes ({num_codes}), got {int(flat.max())}"
        )
    counts = torch.bincount(flat, minlength=num_codes).cpu()
    probs = counts.double() / counts.sum()
    entropy = torch.special.entr(probs).sum()
    used = int((counts > 0).sum())
    return CodeUsage(float(entropy.exp()), used, used / num_codes, counts)
