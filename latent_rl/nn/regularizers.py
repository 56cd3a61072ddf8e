"""Losses that keep a codebook spread out and in use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["orthogonality_loss", "usage_loss"]

# Rows whose distances to all codes are held at a time.
_CHUNK_ROWS = 1024


def orthogonality_loss(codebook: Tensor) -> Tensor:
    """Mean squared cosine of different codes: 0 when they are orthogonal, 1 when all are parallel.

    ``sum_{i != j} cos(c_i, c_j)^2 / (K (K - 1))``. It is computed from the D x D Gram matrix where
    D < K, since ``|U U^T|_F = |U^T U|_F``.

    Args:
        codebook: [K, D].

    Returns:
        Scalar, differentiable; 0 for K = 1.
    """
    k = codebook.shape[0]
    if k < 2:
        return codebook.sum() * 0.0
    wide = codebook if codebook.dtype == torch.float64 else codebook.float()
    unit = nn.functional.normalize(wide, dim=-1)
    gram = unit.T @ unit if unit.shape[1] < k else unit @ unit.T
    # The diagonal's squares: the squared lengths of the unit codes, squared.
    own = unit.square().sum(-1).square().sum()
    return (gram.square().sum() - own) / (k * (k - 1))


def usage_loss(x: Tensor, codebook: Tensor, *, temperature: float = 1.0) -> Tensor:
    """How unevenly soft assignments use the codes: ``log K - H(mean_n softmax(-d_n / T))``.

    0 when all codes are used alike, log K when one code takes everything. Distances are squared
    Euclidean. Rows are taken in chunks whose distances are computed again in the backward pass.

    Args:
        x: [N, D]; rows that are not finite take no part.
        codebook: [K, D].
        temperature: T > 0, in units of squared distance.

    Returns:
        Scalar in nats, differentiable in both; 0 without rows.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"usage_loss: temperature must be > 0, got {temperature}")
    rows, codes = x[x.isfinite().all(-1)].float(), codebook.float()
    if rows.shape[0] == 0:
        return codes.sum() * 0.0
    total = codes.new_zeros(codes.shape[0])
    for chunk in torch.split(rows, _CHUNK_ROWS):
        total = total + checkpoint(_soft_counts, chunk, codes, temperature, use_reentrant=False)
    entropy: Tensor = torch.special.entr(total / rows.shape[0]).sum()
    return math.log(codes.shape[0]) - entropy


def _soft_counts(rows: Tensor, codes: Tensor, temperature: float) -> Tensor:
    # |x|^2 is the same for all codes and drops out of the softmax.
    scores = 2.0 * rows @ codes.T - codes.square().sum(-1)
    return (scores / temperature).softmax(-1).sum(0)
