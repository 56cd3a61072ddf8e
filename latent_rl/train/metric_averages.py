"""Averages of the metrics between two log entries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["MetricAverages"]


class MetricAverages:
    """Collects scalar metrics without reading them back, and averages them when asked."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = defaultdict(list)

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Record one value per name; tensors stay on their device until `flush`."""
        for name, value in metrics.items():
            self._values[name].append(value.detach() if isinstance(value, Tensor) else value)

    def flush(self, prefix: str = "") -> dict[str, float]:
        """Return the mean of every name (NaN entries left out) and forget the values."""
        averages = {}
        for name, values in self._values.items():
            numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
            averages[prefix + name] = float(numbers.nanmean())
        self._values.clear()
        return averages

    def state_dict(self) -> dict[str, Any]:
        """Return the values recorded since the last `flush`, as numbers."""
        return {name: [float(value) for value in values] for name, values in self._values.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Replace the recorded values."""
        self._values.clear()
        for name, values in state_dict.items():
            self._values[name] = [float(value) for value in values]
