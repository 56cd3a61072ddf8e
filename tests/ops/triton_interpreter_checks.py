"""nearest_code on the Triton backend; run by test_nearest_code.py with TRITON_INTERPRET=1."""

import pytest
import torch

from latent_rl import ops
from tests.ops.search_cases import (
    METRICS,
    SIZES,
    TINY_SCALES,
    excess,
    hostile_searches,
    oracle,
    random_search,
    tiny_search,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_RL_BACKEND", "nearest_code=triton")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_random_rows_get_the_codes_of_the_oracle(size, dtype, metric) -> None:
    x, codebook = random_search(size, dtype)
    assert torch.equal(ops.nearest_code(x, codebook, metric), oracle(x, codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hostile_searches(torch.float32))
def test_hostile_rows_get_a_nearest_code(name, dtype, metric) -> None:
    x, codebook = hostile_searches(dtype)[name]
    codes, distance = ops.nearest_code(x, codebook, metric, return_distance=True)
    expected = oracle(x, codebook, metric)
    assert torch.equal(codes < 0, expected < 0)
    assert torch.equal(distance.isnan(), expected < 0)
    scale = x.double().nan_to_num(0, 0, 0).square().sum(-1).amax()
    assert (excess(x, codebook, codes, metric) <= 1e-14 * (1 + scale)).all()


def test_scores_beyond_float32_are_searched_exactly() -> None:
    x, codebook = 1e30 * torch.randn(12, 16), 1e30 * torch.randn(9, 16)
    assert torch.equal(ops.nearest_code(x, codebook), oracle(x[None], codebook[None], "l2")[0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", TINY_SCALES[::2])
def test_scores_below_float32_are_searched_exactly(scale, dtype, metric) -> None:
    x, codebook = tiny_search(scale, dtype)
    codes = ops.nearest_code(x, codebook, metric)
    assert torch.equal(codes, oracle(x[None], codebook[None], metric)[0])


def test_no_rows() -> None:
    assert ops.nearest_code(torch.empty(0, 3), torch.randn(2, 3)).shape == (0,)
