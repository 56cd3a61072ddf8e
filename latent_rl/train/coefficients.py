"""Coefficients that change over a run, as objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

__all__ = [
    "COEFFICIENT_SCHEDULES",
    "CoefficientSchedule",
    "ConstantCoefficient",
    "CosineCoefficient",
    "LinearCoefficient",
    "coefficient_schedule",
]


class CoefficientSchedule(Protocol):
    """A coefficient as a function of the share of the run that is over."""

    def __call__(self, progress: float) -> float:
        """progress in [0, 1] -> coefficient."""
        ...


@dataclass(frozen=True)
class ConstantCoefficient:
    """start throughout."""

    start: float

    def __call__(self, progress: float) -> float:
        return self.start


@dataclass(frozen=True)
class LinearCoefficient:
    """start + (end - start) * progress."""

    start: float
    end: float = 0.0

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * min(max(progress, 0.0), 1.0)


@dataclass(frozen=True)
class CosineCoefficient:
    """end + (start - end) * (1 + cos(pi * progress)) / 2."""

    start: float
    end: float = 0.0

    def __call__(self, progress: float) -> float:
        turned = math.cos(math.pi * min(max(progress, 0.0), 1.0))
        return self.end + (self.start - self.end) * (1 + turned) / 2


COEFFICIENT_SCHEDULES: Mapping[str, Callable[[float, float], CoefficientSchedule]] = (
    MappingProxyType(
        {
            "constant": lambda start, end: ConstantCoefficient(start),
            "linear": LinearCoefficient,
            "cosine": CosineCoefficient,
        }
    )
)


def coefficient_schedule(name: str, start: float, end: float) -> CoefficientSchedule:
    """Return the schedule of an `entropy_schedule` name. Raises ValueError for an unknown one."""
    if name not in COEFFICIENT_SCHEDULES:
        raise ValueError(
            f"entropy_schedule must be one of {sorted(COEFFICIENT_SCHEDULES)}, got {name!r}"
        )
    return COEFFICIENT_SCHEDULES[name](start, end)
