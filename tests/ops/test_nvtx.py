"""Every op pushes an NVTX range of its own name and pops it, whatever happens inside."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from latent_rl.backends import OPS

# A domain that records, in place of the real one: the ops fetch theirs when they are imported.
SCRIPT = """
import json, os, sys, types

LOG, OPEN = [], []

class Domain:
    def get_event_attributes(self, message):
        return message
    def push_range(self, attributes):
        LOG.append(attributes)
        OPEN.append(attributes)
    def pop_range(self):
        OPEN.pop()

sys.modules["nvtx"] = fake = types.ModuleType("nvtx")
fake.get_domain = lambda name: Domain()

import torch
from latent_rl import ops

def logged(call):
    LOG.clear()
    call()
    return {"pushed": list(LOG), "left_open": list(OPEN)}

def gradients(*outputs):
    total = sum(t.float().sum() for t in outputs if t.requires_grad)
    total.backward()

x = torch.randn(6, 4, requires_grad=True)
codebook = torch.randn(5, 4, requires_grad=True)
logits = torch.randn(6, 5, requires_grad=True)
codes = torch.tensor([0, 1, 2, 3, 4, 0])
cached = torch.randn(10, 2, 8)
weights = [torch.randn(3, 8, requires_grad=True) for _ in range(2)]
weights.append(torch.randn(4, 3, requires_grad=True))

calls = {
    "nearest_code": lambda: ops.nearest_code(x, codebook),
    "quantize": lambda: gradients(*ops.quantize(x, codebook)),
    "gumbel_quantize": lambda: gradients(*ops.gumbel_quantize(logits, codebook, seed=0)),
    "gated_merge": lambda: gradients(ops.gated_merge(x, codes, codebook, *weights)),
    "sample_codes": lambda: ops.sample_codes(logits, seed=0),
    "sample_tokens": lambda: ops.sample_tokens(logits, seed=0),
    "code_logprobs": lambda: gradients(*ops.code_logprobs(logits, codes)),
    "slot_attention": lambda: ops.slot_attention(
        torch.randn(2, 4, 8), cached, cached, torch.tensor([[0, 3, 0, 2, 4]] * 2), longest=4
    ),
}
found = {"calls": {name: logged(call) for name, call in calls.items()}}

def forced():
    os.environ["LATENT_RL_BACKEND"] = "sample_codes=cuda"
    try:
        ops.sample_codes(logits, seed=0)
    except RuntimeError as error:
        found["error"] = str(error)
    finally:
        del os.environ["LATENT_RL_BACKEND"]

found["raising"] = logged(forced)

compiled = torch.compile(lambda t: ops.quantize(t, codebook).quantized * 2, fullgraph=True,
                         backend="aot_eager")
found["compiled"] = logged(lambda: compiled(x).sum().backward())
found["same"] = bool(torch.equal(compiled(x), ops.quantize(x, codebook).quantized * 2))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    import json

    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", OPS)
def test_an_op_pushes_its_name_and_pops_it(op: str, found: dict) -> None:
    ranges = found["calls"][op]
    assert all(name.startswith(f"latent_rl::{op}") for name in ranges["pushed"])
    differentiable = op not in ("nearest_code", "sample_codes", "sample_tokens", "slot_attention")
    assert any(name.endswith("_backward") for name in ranges["pushed"]) == differentiable
    assert not ranges["pushed"][0].endswith("_backward")
    assert ranges["left_open"] == []


def test_a_call_that_raises_pops_its_range(found: dict) -> None:
    assert "forces cuda" in found["error"]
    assert found["raising"] == {"pushed": ["latent_rl::sample_codes"], "left_open": []}


def test_compiled_code_pushes_them_at_run_time(found: dict) -> None:
    names = ["latent_rl::quantize_forward", "latent_rl::quantize_backward"]
    assert found["compiled"] == {"pushed": names, "left_open": []}
    assert found["same"]


def test_a_phase_is_named_for_both_profilers_and_ends_whatever_happens(monkeypatch) -> None:
    import torch

    from latent_rl.ops import ranges

    log: list[str] = []

    class Domain:
        def get_event_attributes(self, message: str) -> str:
            return message

        def push_range(self, attributes: str) -> None:
            log.append(attributes)

        def pop_range(self) -> None:
            log.append("pop")

    monkeypatch.setattr(ranges, "DOMAIN", Domain())
    ranges._attributes.cache_clear()
    try:
        with torch.profiler.profile() as profiler, pytest.raises(KeyError), ranges.phase("reward"):
            raise KeyError
    finally:
        ranges._attributes.cache_clear()
    assert log == ["latent_rl::reward", "pop"]
    assert "latent_rl::reward" in {event.key for event in profiler.key_averages()}
