"""The dispatch table: order, forcing, and what it says when it cannot."""

import pytest
import torch

from latent_rl import backends, ops

CPU = backends.Request(torch.device("cpu"), torch.float32)
GPU = backends.Request(torch.device("cuda", 0), torch.float32)


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENT_RL_BACKEND", raising=False)


@pytest.mark.parametrize("op", backends.OPS)
def test_the_extension_serves_the_cpu(op) -> None:
    assert backends.resolve(op, CPU).name == "native"


@pytest.mark.parametrize("op", backends.OPS)
def test_every_row_but_the_reference_can_say_why_not(op) -> None:
    reasons = dict(backends.explain(op, GPU))
    assert reasons["native"] == "runs on the CPU, tensors are on cuda:0"
    assert reasons["reference"] is None


def test_forcing_by_op_and_for_all(monkeypatch) -> None:
    monkeypatch.setenv("LATENT_RL_BACKEND", "reference,quantize=native")
    assert backends.resolve("sample_codes", CPU).name == "reference"
    assert backends.resolve("quantize", CPU).name == "native"


def test_a_forced_row_that_cannot_run_raises_with_every_reason(monkeypatch) -> None:
    monkeypatch.setenv("LATENT_RL_BACKEND", "sample_codes=cuda")
    with pytest.raises(
        RuntimeError, match=r"forces cuda.*cuda: runs on CUDA devices.*native: can serve"
    ):
        ops.sample_codes(torch.zeros(2, 3), seed=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nope", "unknown backend 'nope'"),
        ("nearest=native", "unknown op 'nearest'"),
        ("quantize=triton", "unknown backend 'triton'"),
    ],
)
def test_unknown_names_are_refused(monkeypatch, value, message) -> None:
    monkeypatch.setenv("LATENT_RL_BACKEND", value)
    with pytest.raises(ValueError, match=message):
        ops.quantize(torch.zeros(2, 3), torch.zeros(1, 3))


def test_the_reference_on_a_gpu_warns() -> None:
    backends._resolve.cache_clear()
    # No kernel takes float64 on a GPU.
    request = backends.Request(GPU.device, torch.float64)
    with pytest.warns(UserWarning, match="no kernel serves"):
        assert backends.resolve("quantize", request).name == "reference"
