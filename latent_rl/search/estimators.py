"""Unbiased estimates of what k samples would give, from n >= k samples of a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["best_at_k", "pass_at_k"]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k samples is correct: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al., arXiv 2107.03374, eq. 1. 1 - (1 - c/n)^k would be biased.

    Args:
        samples: n drawn.
        correct: c of them.
        k: at most n.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"pass_at_k: correct must be in [0, {samples}], got {correct}")
    _check_k("pass_at_k", k, samples)
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def best_at_k(scores: Sequence[float], k: int) -> float:
    """Expected best score of k samples drawn from the n given ones without replacement.

    sum_i C(i - 1, k - 1) / C(n, k) * s_(i), with s_(1) <= ... <= s_(n): the i-th is the best of k
    when the others are among the i - 1 below it. k = 1 is the mean; scores in {0, 1} give
    :func:`pass_at_k`.

    Raises:
        ValueError: for k outside [1, n], or a score that is not finite.
    """
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"best_at_k: scores must be finite, got {list(scores)}")
    _check_k("best_at_k", k, len(scores))
    ways = math.comb(len(scores), k)
    return math.fsum(
        math.comb(below, k - 1) / ways * score for below, score in enumerate(sorted(scores))
    )


def _check_k(name: str, k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"{name}: k must be in [1, {samples}], the number of samples, got {k}")
