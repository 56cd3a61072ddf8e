"""What reward functions may log beside their rewards: TRL's `log_metric` and `log_extra`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["RewardLog"]


class RewardLog:
    """Collects what reward functions log through the arguments `log_metric` and `log_extra`.

    `columns` holds the extra columns of the rollout before the last `flush`, one value per scored
    completion, in the order they were scored in.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._columns: dict[str, list[Any]] = defaultdict(list)

    def log_metric(self, name: str, value: float) -> None:
        """Record a number of this batch; logged as the mean over batches and processes."""
        self._metrics[name].append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Record a column of values, one per completion of the batch."""
        self._columns[column].extend(values)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments a reward function is given."""
        return {"log_metric": self.log_metric, "log_extra": self.log_extra}

    def flush(self, gather_objects: Callable[[list[Any]], list[Any]]) -> dict[str, float]:
        """Return the metrics' means over all processes, forget them, and close the columns.

        gather_objects: joins a list of every process; called on every process, whatever was logged.
        """
        joined: dict[str, list[float]] = defaultdict(list)
        for metrics in gather_objects([dict(self._metrics)]):
            for name, values in metrics.items():
                joined[name].extend(values)
        self._metrics.clear()
        self.columns, self._columns = dict(self._columns), defaultdict(list)
        return {name: sum(values) / len(values) for name, values in sorted(joined.items())}
