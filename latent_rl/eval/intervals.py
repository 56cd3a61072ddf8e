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
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0; False without an interval."""
        return self.low > 0 or self.high < 0

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

    ``values`` must be independent, so one per prompt and not one per sample: see
    :func:`clustered_interval`. With fewer than about 20 the interval is too narrow (it covers less
    than 95 %).

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.

    Raises:
        ValueError: without values, or when one is not finite.
    """
    data = _checked("bootstrap_interval", values)
    if len(data) == 1:
        return Interval(float(data[0]), math.nan, math.nan)
    rng = np.random.default_rng(seed)
    # At most 2^22 indices (32 MiB) at once, however many prompts there are.
    at_once = max(1, 2**22 // len(data))
    means = np.concatenate(
        [
            data[rng.integers(len(data), size=(min(at_once, resamples - done), len(data)))].mean(1)
            for done in range(0, resamples, at_once)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(data.mean()), float(low), float(high))


def clustered_interval(
    groups: Sequence[Sequence[float]], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean over prompts of each prompt's mean over its samples, with its bootstrap interval.

    Prompts are resampled and keep all their samples. The samples of a prompt share its difficulty;
    resampling them as if they were independent would give an interval that is too narrow, by up to
    sqrt(M) for M samples. What the luck of sampling adds is in the prompts' means already.

    Args:
        groups: per prompt, the values of its samples. Empty ones (every sample lost) are left out.

    Raises:
        ValueError: when nothing is left, or a value is not finite.
    """
    for group in groups:
        _checked("clustered_interval", group or [0.0])
    means = [math.fsum(group) / len(group) for group in groups if group]
    return bootstrap_interval(means, resamples=resamples, seed=seed)


def paired_interval(
    before: Sequence[float], after: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of ``after - before`` over the same prompts in the same order, with its interval.

    Pairing takes the difficulty of the prompts out of the difference, so it shows differences that
    two separate intervals hide. An interval that excludes 0 says that the difference would stand
    on other prompts of the same kind; it says nothing of another training seed.

    Raises:
        ValueError: for lengths that differ, no values, or values that are not finite.
    """
    first, second = _checked("paired_interval", before), _checked("paired_interval", after)
    if len(first) != len(second):
        raise ValueError(
            f"paired_interval: after must have one value per prompt ({len(first)}), "
            f"got {len(second)}"
        )
    return bootstrap_interval((second - first).tolist(), resamples=resamples, seed=seed)


def _checked(name: str, values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    data = np.asarray(values, dtype=np.float64).reshape(-1)
    if not len(data):
        raise ValueError(f"{name}: values must hold at least one number, got none")
    if not np.isfinite(data).all():
        raise ValueError(f"{name}: values must be finite, got {list(values)}")
    return data
