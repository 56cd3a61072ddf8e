"""Reference of nearest_code."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_codes(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The codes of ``nearest_code``."""
    return nearest_code(x, codebook, metric)[0]


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest code of every row, by distances in float64.

    Args:
        x: [G, N, D].
        codebook: [G, K, D].
        metric: "l2" (squared Euclidean), "cosine" (1 - cosine) or "dot" (negated product).

    Returns:
        codes int64 [G, N], lowest id on ties, -1 for rows that are not finite or when no code is;
        distances [G, N], float64 for float64 input and float32 otherwise, NaN where code is -1.
    """
    rows, codes = x.double(), codebook.double()
    if metric == "l2":
        # The difference form: the expanded one cancels where a code lies close to its row.
        distance = torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist").square()
    elif metric == "cosine":
        # A cosine does not depend on length, however short; only a zero vector has cosine 0.
        smallest = torch.finfo(torch.float64).tiny
        unit_rows = torch.nn.functional.normalize(rows, dim=-1, eps=smallest)
        unit_codes = torch.nn.functional.normalize(codes, dim=-1, eps=smallest)
        distance = 1 - _products(unit_rows, unit_codes)
    else:
        distance = -_products(rows, codes)
    usable = codebook.isfinite().all(-1)
    distance = distance.masked_fill(~usable[:, None], torch.inf)
    best = distance.argmin(-1)
    nearest = distance.gather(-1, best[..., None])[..., 0]
    valid = x.isfinite().all(-1) & usable.any(-1)[:, None]
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        torch.where(valid, best, -1),
        torch.where(valid, nearest, torch.nan).to(accumulator),
    )


def _products(rows: Tensor, codes: Tensor) -> Tensor:
    """Products [G, N, K], each summed by itself: equal codes have equal products.

    A matrix product may sum its columns in different orders, and then a duplicate of the nearest
    code could win by a rounding.
    """
    at_once = max(1, 2**24 // max(1, codes[0].numel()))
    parts = [
        (part[:, :, None] * codes[:, None]).sum(-1) for part in torch.split(rows, at_once, dim=1)
    ]
    return torch.cat(parts, 1)
