"""The backends that can run on this machine, one test run each."""

from collections.abc import Iterator

import pytest
import torch

BACKENDS = ("reference", "native")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Force one row of the dispatch table for every op that has it."""
    monkeypatch.setenv("LATENT_RL_BACKEND", request.param)
    yield request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
