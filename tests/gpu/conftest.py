"""What the tests on real hardware share: every device, and a graph captured and replayed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of many gigabytes run one after another, whatever the number of workers."""
    for item in items:
        if "offsets" in item.name:
            item.add_marker(pytest.mark.xdist_group("memory"))


@pytest.fixture(autouse=True)
def _memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "offsets" in request.node.name:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def cuda() -> torch.device:
    """The first device."""
    return torch.device("cuda", 0)


@pytest.fixture
def other_cuda() -> torch.device:
    """A device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    return torch.device("cuda", 1)


@pytest.fixture
def capture() -> Callable[[Callable[[], Any]], tuple[torch.cuda.CUDAGraph, Any]]:
    """``capture(call)`` -> (graph, its outputs), after the warm-up that Triton needs to compile."""

    def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        return graph, outputs

    return captured
