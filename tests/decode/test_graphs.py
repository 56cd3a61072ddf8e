"""What can be said of captured steps without a GPU: how they are captured."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch

from latent_rl.decode.graphs import StepGraphs


class Graph:
    """In the place of a CUDA graph: replays nothing."""

    def replay(self) -> None:
        """Nothing."""

    def pool(self) -> int:
        """Any."""
        return 1


class FakeStep:
    """A step that casts a weight, as autocast does."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.eye(4))
        self.caches: list[bool] = []

    def snapshot(self) -> list[torch.Tensor]:
        """Nothing to put back."""
        return []

    def restore(self, saved: list[torch.Tensor]) -> None:
        """Nothing to put back."""

    def __call__(self, n: int, bound: int) -> None:
        """A product of a weight under autocast."""
        self.caches.append(torch.is_autocast_cache_enabled())
        torch.ones(1, 4) @ self.weight


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and graphs that do nothing."""

    class Stream:
        def wait_stream(self, other: Any) -> None:
            """Nothing to wait for."""

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())


def test_a_step_is_captured_with_the_casts_of_its_weights(no_cuda) -> None:
    graphs, step = StepGraphs(), FakeStep()
    with torch.autocast("cpu", torch.bfloat16):
        # As the prompts' forward before the first step: autocast now holds a copy.
        step(1, 1)
        graphs.run(cast(Any, step), step, 1, 1, 1)
        assert torch.is_autocast_cache_enabled()
    assert step.caches == [True, False, False, False]


def test_the_cache_is_back_when_a_capture_fails(no_cuda) -> None:
    def fails(n: int, bound: int) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        StepGraphs().run(cast(Any, FakeStep()), fails, 1, 1, 1)
    assert torch.is_autocast_cache_enabled()
