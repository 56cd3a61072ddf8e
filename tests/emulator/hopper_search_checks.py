"""The whole Hopper search: its screen emulated, Triton's interpreter around it.

Run by test_nearest_code_emulated.py with TRITON_INTERPRET=1. float16 alone: the interpreter
multiplies bfloat16 as integers.
"""

import pytest
import torch
from latent_rl.kernels.nearest_code import hopper_impl, triton_impl

from latent_rl import ops
from tests.ops.search_cases import hostile_searches, oracle

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
METRICS = ("l2", "cosine", "dot")


@pytest.fixture(autouse=True)
def served(emulated, monkeypatch):
    emulated("nearest_code", modules=("nearest_code_hopper",))
    monkeypatch.setenv("LATENT_RL_BACKEND", "nearest_code=hopper")


def search(groups, n, num_codes, width):
    return tuple(torch.randn(groups, size, width).half() for size in (n, num_codes))


@pytest.mark.parametrize("metric", METRICS)
def test_random_rows_get_the_codes_of_the_oracle(metric) -> None:
    # An odd width, which the copy engine cannot read: both are padded for the screen.
    x, codebook = search(2, 20, 140, 37)
    codes, distance = ops.nearest_code(x, codebook, metric, return_distance=True)
    assert torch.equal(codes, oracle(x, codebook, metric))
    assert distance.isfinite().all()


@pytest.mark.parametrize("name", ["duplicate codes", "not finite", "near duplicates"])
def test_hostile_rows_get_a_nearest_code(name) -> None:
    x, codebook = hostile_searches(torch.float16)[name]
    assert torch.equal(ops.nearest_code(x, codebook), oracle(x, codebook, "l2"))


def test_most_rows_are_decided_by_the_screen() -> None:
    x, codebook = search(1, 60, 128, 64)
    codebook[:, 120:] = codebook[:, :8]
    codes, _, stats = hopper_impl.nearest_code_with_stats(x, codebook, "l2")
    theirs, _, their_stats = triton_impl.nearest_code_with_stats(x, codebook, "l2")
    assert torch.equal(codes, theirs)
    # Shorter keys: no more rows are listed than by the screen of Triton.
    assert 0 < stats.fraction_reranked <= their_stats.fraction_reranked < 0.3


def test_what_it_does_not_take_is_told() -> None:
    for width, dtype, error in ((257, torch.float16, ValueError), (8, torch.float32, TypeError)):
        with pytest.raises(error, match="hopper takes"):
            ops.nearest_code(torch.zeros(2, width, dtype=dtype), torch.zeros(2, width, dtype=dtype))
