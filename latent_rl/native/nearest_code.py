"""C++ backend of nearest_code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import accumulator, address, dtype_code, rows_of, threads

__all__ = ["SearchStats", "nearest_code", "nearest_code_with_stats", "nearest_codes"]

METRIC_CODES = {"l2": 0, "cosine": 1, "dot": 2}


@dataclass(frozen=True)
class SearchStats:
    """How much of a search its screens could not decide.

    Attributes:
        rows: rows searched, G * N.
        reranked: rows for which the first screen's error bound left more than one code.
        rescreened: of those, rows left with so many codes that a bfloat16 screen handed them to the
            float32 screen; 0 where float32 screens first.
        in_float64: rows decided by float64 distances.
    """

    rows: int
    reranked: int
    rescreened: int
    in_float64: int

    @property
    def fraction_reranked(self) -> float:
        """Share of rows looked at again after the first screen; 0 without rows."""
        return self.reranked / self.rows if self.rows else 0.0


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest code of every row: exactly the code float64 chooses, at float32 speed or better.

    Args:
        x: [G, N, D] on the CPU, any strides.
        codebook: [G, K, D], same dtype.
        metric: "l2" (squared Euclidean), "cosine" (1 - cosine) or "dot" (negated product).

    Returns:
        codes int64 [G, N], the lowest id on ties, -1 for rows that are not finite or when no code
        is; distances [G, N], float64 for float64 input and float32 otherwise, NaN where the code is
        -1. Neither depends on the number of threads or on the other rows.
    """
    return _search(x, codebook, metric, None)


def nearest_codes(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The codes of ``nearest_code`` alone: no distance is computed."""
    return _search(x, codebook, metric, None, distances=False)[0]


def nearest_code_with_stats(
    x: Tensor, codebook: Tensor, metric: str
) -> tuple[Tensor, Tensor, SearchStats]:
    """``nearest_code``, and how many rows its screens could not decide.

    float64 input is searched without a screen: its counts are 0.
    """
    counters = torch.zeros(3, dtype=torch.int64)
    codes, distance = _search(x, codebook, metric, counters)
    return codes, distance, SearchStats(codes.numel(), *counters.tolist())


def _search(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    counters: Tensor | None,
    *,
    distances: bool = True,
) -> tuple[Tensor, Tensor]:
    groups, rows, dim = x.shape
    x, codebook = rows_of(x), codebook.contiguous()
    codes = torch.empty((groups, rows), dtype=torch.int64)
    distance = torch.empty((groups, rows) if distances else (0,), dtype=accumulator(x.dtype))
    _C.nearest_code(
        dtype_code("nearest_code", x),
        METRIC_CODES[metric],
        address(x),
        address(codebook),
        address(codes),
        address(distance) if distances else 0,
        groups,
        rows,
        codebook.shape[1],
        dim,
        x.stride(0),
        max(x.stride(1), dim),
        address(counters),
        threads(),
    )
    return codes, distance
