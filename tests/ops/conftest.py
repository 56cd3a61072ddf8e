"""The backends that can run on this machine, one test run each."""

import pytest
import torch

BACKENDS = ("reference", "native")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one row of the dispatch table for every op that has it."""
    monkeypatch.setenv("LATENT_RL_BACKEND", request.param)
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
