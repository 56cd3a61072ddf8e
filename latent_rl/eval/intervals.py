"""Confidence intervals for evaluation scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom (any statistics table);
# written out so that evaluation needs no SciPy.
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL_95 = 1.960


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval; ``low == high == nan`` for one value."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


def t_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values, such as evaluation seeds.

    Raises:
        ValueError: without values, or when one is not finite.
    """
    data = _checked("t_interval", values)
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, math.nan, math.nan)
    degrees = len(data) - 1
    quantile = _T_95[degrees - 1] if degrees <= len(_T_95) else _NORMAL_95
    half = quantile * float(data.std(ddof=1)) / math.sqrt(len(data))
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean, for skewed scores such as rewards of prompts.

    Raises:
        ValueError: without values, or when one is not finite.
    """
    data = _checked("bootstrap_interval", values)
    if len(data) == 1:
        return Interval(float(data[0]), math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(len(data), size=(resamples, len(data)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(data.mean()), float(low), float(high))


def _checked(name: str, values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    data = np.asarray(values, dtype=np.float64).reshape(-1)
    if not len(data):
        raise ValueError(f"{name}: values must hold at least one number, got none")
    if not np.isfinite(data).all():
        raise ValueError(f"{name}: values must be finite, got {list(values)}")
    return data
