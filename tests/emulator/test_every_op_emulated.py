"""What every op promises, of the CUDA rows on the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latent_rl.native import gated_merge_cuda
from tests.ops import every_op_checks as checks
from tests.ops.every_op import EVERY_OP, OpCase

from .test_gated_merge_emulated import product_in_float32

# Per op the rooms whose kernels it runs besides its own, and the modules that call them.
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "quantize": {"rooms": ("segments",), "modules": ("quantize_cuda", "_segments_cuda")},
    "gumbel_quantize": {
        "rooms": ("segments",),
        "modules": ("gumbel_quantize_cuda", "_segments_cuda"),
    },
    "gated_merge": {"rooms": ("segments",), "modules": ("gated_merge_cuda", "_segments_cuda")},
    "sample_codes": {},
    "sample_tokens": {},
    "code_logprobs": {"modules": ("code_logprobs_cuda",)},
}
# Of the others, which took minutes here, the ops' own tests have small forms.
CHECKS = ("no rows",)


@pytest.fixture(
    params=[case for case in EVERY_OP if "cuda" in case.cuda_rows], ids=lambda case: case.name
)
def case(request: pytest.FixtureRequest, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> OpCase:
    chosen: OpCase = request.param
    monkeypatch.setattr(gated_merge_cuda, "_table", product_in_float32)
    emulated(chosen.op, **PARTS[chosen.op])
    return chosen


@pytest.mark.parametrize("name", CHECKS)
def test_every_op_keeps_its_promises(case, name) -> None:
    checks.CHECKS[name](case, torch.device("cpu"), torch.bfloat16)


def test_inputs_far_apart(case) -> None:
    checks.far_apart(case, torch.device("cpu"), torch.float32, far=20_000)
