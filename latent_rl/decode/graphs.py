"""CUDA graphs of a whole decoding step, one per batch bucket and context bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from latent_rl.decode.step import Step
from latent_rl.models import LatentActionModel

__all__ = ["StepGraphs", "bucket_of"]

_WARM_UPS = 2


def bucket_of(n: int, slots: int) -> int:
    """Rows to run for n: the next power of two, at most all slots."""
    return min(slots, 1 << max(0, n - 1).bit_length())


class StepGraphs:
    """Captured steps. Weights are read where they lie, so an optimizer's update is seen; when they
    have moved (another dtype, loaded by assignment), everything is captured anew."""

    def __init__(self) -> None:
        """Nothing captured."""
        self._graphs: dict[tuple[Step, int, int], torch.cuda.CUDAGraph] = {}
        self._weights: tuple[int, ...] = ()
        self._pool: Any = None

    def clear(self) -> None:
        """Drop all graphs."""
        self._graphs.clear()
        self._pool = None

    def check_weights(self, model: LatentActionModel) -> None:
        """Drop all graphs when a parameter or buffer lies elsewhere than at their capture."""
        now = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
        if now != self._weights:
            self.clear()
            self._weights = now

    def run(
        self, step: Step, call: Callable[[int, int], None], n: int, slots: int, bound: int
    ) -> None:
        """Replay ``call``, the step or its compiled form, for n slots; capture it at first."""
        bucket = bucket_of(n, slots)
        key = (step, bucket, bound)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(step, call, bucket, bound)
        graph.replay()

    def _capture(
        self, step: Step, call: Callable[[int, int], None], n: int, bound: int
    ) -> torch.cuda.CUDAGraph:
        """Warm up on the slots as they are, put them back, capture."""
        with _casts_in_the_graph():
            return self._captured(step, call, n, bound)

    def _captured(
        self, step: Step, call: Callable[[int, int], None], n: int, bound: int
    ) -> torch.cuda.CUDAGraph:
        saved = step.snapshot()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call(n, bound)
                step.restore(saved)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            call(n, bound)
        self._pool = self._pool or graph.pool()
        return graph


@contextmanager
def _casts_in_the_graph() -> Iterator[None]:
    """Under autocast, let weights be cast within the graph.

    Autocast keeps the copy it casts of a weight until it ends. A graph that reads the copy instead
    of the weight would read freed memory at the next rollout, and never see an update.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
