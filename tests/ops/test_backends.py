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


@pytest.mark.parametrize(
    ("device", "dtype", "width", "reason"),
    [
        ("cuda", torch.float32, 64, "takes bfloat16 and float16, got torch.float32"),
        ("cuda", torch.bfloat16, 257, "takes widths up to 256, got 257"),
        ("cpu", torch.bfloat16, 64, "runs on CUDA devices, tensors are on cpu"),
    ],
)
def test_hopper_says_why_not(device, dtype, width, reason) -> None:
    request = backends.Request(torch.device(device), dtype, width)
    assert dict(backends.explain("nearest_code", request))["hopper"] == reason


def test_hopper_serves_its_own_architecture_and_only_when_forced(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    monkeypatch.setattr(backends, "_extension_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    request = backends.Request(torch.device("cuda", 0), torch.bfloat16, 256)
    for capability, reason in (
        ((9, 0), None),
        ((8, 0), "is written for sm_90 (Hopper), cuda:0 is sm_80"),
        ((10, 0), "is written for sm_90 (Hopper), cuda:0 is sm_100"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert dict(backends.explain("nearest_code", request))["hopper"] == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    backends._resolve.cache_clear()
    assert backends.resolve("nearest_code", request).name == "triton"
    monkeypatch.setenv("LATENT_RL_BACKEND", "nearest_code=hopper")
    assert backends.resolve("nearest_code", request).name == "hopper"
    backends._resolve.cache_clear()


def test_the_width_of_a_call_is_asked_about(monkeypatch) -> None:
    monkeypatch.setenv("LATENT_RL_BACKEND", "nearest_code=hopper")
    with pytest.raises(RuntimeError, match=r"hopper: takes widths .* got 300"):
        ops.nearest_code(torch.zeros(2, 300).bfloat16(), torch.zeros(1, 300).bfloat16())
