"""nearest_code on the Triton backend; run by test_nearest_code.py with TRITON_INTERPRET=1."""

from dataclasses import replace

import pytest
import torch
from latent_rl.kernels.nearest_code import configs, triton_impl

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


# the screen and its bound


def searched(x, codebook, metric="l2"):
    """Codes and how many rows the screen left undecided."""
    codes, _, stats = triton_impl.nearest_code_with_stats(x[None], codebook[None], metric)
    return codes[0], stats.reranked.item()


def test_most_rows_are_decided_by_the_screen() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 40, generator=generator)
    codebook = torch.randn(60, 40, generator=generator)
    for offset in (0, 1000):
        codes, undecided = searched(x + offset, codebook + offset)
        assert torch.equal(codes, oracle((x + offset)[None], (codebook + offset)[None], "l2")[0])
        # tf32 leaves 2 to 3 rows of a hundred; centring keeps it so however far the origin.
        assert undecided <= 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_screened_as_they_are(dtype) -> None:
    x, codebook = random_search((1, 300, 60, 40), dtype)
    codes, undecided = searched(x[0], codebook[0])
    assert torch.equal(codes, oracle(x, codebook, "l2")[0])
    assert undecided <= 3


@pytest.mark.parametrize("lead", [1e-7, -1e-7])
def test_rounding_rows_and_codes_does_not_decide(lead) -> None:
    """Rows half way between two codes, closer to either by less than tf32 can tell."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(30, 64, generator=generator)
    second = first + 0.01 * torch.randn(30, 64, generator=generator)
    x = (first.double() * (0.5 + lead) + second.double() * (0.5 - lead)).float()
    codebook = torch.cat([first, second])
    codes, undecided = searched(x, codebook)
    assert torch.equal(codes, oracle(x[None], codebook[None], "l2")[0])
    assert undecided == 30
    # As a check of the test: the rounded numbers alone choose otherwise somewhere.
    shift = codebook.mean(0)
    rounded_x, rounded = (tf32(t - shift).double() for t in (x, codebook))
    score = rounded_x @ rounded.T - (codebook - shift).double().square().sum(-1) / 2
    assert not torch.equal(score.argmax(-1), codes)


def tf32(t):
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x1000) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("who", ["rows", "codes"])
def test_the_bound_on_rounding_is_attained(who) -> None:
    """Residuals parallel to what multiplies them: without its term the screen is sure, and wrong.

    Every number is a tf32 number plus 0.9 * 2^-12. Rounded, the product is -28 * 2^-12; in truth it
    is (57.6 - 28) * 2^-12, and what the accumulation may lose is 8 * 2^-12.
    """
    signs = torch.ones(64)
    signs[::2] = -1
    signs[0] -= 28 * 2.0**-12
    hard, easy = (signs.double() + 0.9 * 2.0**-12).float(), torch.ones(64)
    x, code = (hard, easy) if who == "rows" else (easy, hard)
    assert tf32(hard) @ easy < 0 < hard.double() @ easy.double()
    # A codebook of opposites has mean zero: centring moves nothing.
    codes, undecided = searched(x[None], torch.stack([code, -code]), "dot")
    assert (codes.item(), undecided) == (0, 1)


@pytest.mark.parametrize("programs", [1, 3, 16])
@pytest.mark.parametrize("tiles", [configs.RERANK, configs.RERANK_MANY])
def test_how_the_second_search_is_shared_out_does_not_show(monkeypatch, tiles, programs) -> None:
    """Few tiles split the codebook between programs; many are strided over."""
    again = replace(tiles, programs=programs, block_k=16)
    monkeypatch.setattr(triton_impl, "choose_rerank", lambda n: again)
    generator = torch.Generator().manual_seed(5)
    codebook = torch.randn(70, 24, generator=generator)
    codebook[35:] = codebook[:35].clone()
    x = codebook[:60] + 1e-7
    x[17, 3], x[50] = torch.nan, torch.inf
    codes, undecided = searched(x, codebook)
    assert torch.equal(codes, oracle(x[None], codebook[None], "l2")[0])
    assert codes.max() < 35, "the lowest id wins across parts"
    assert undecided == 60


def test_more_groups_than_a_grid_holds(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(5, 9, 12, generator=generator)
    codebook = torch.randn(5, 7, 12, generator=generator)
    expected = triton_impl.nearest_code_with_stats(x, codebook, "l2")
    monkeypatch.setattr(triton_impl, "MOST_GROUPS", 2)
    got = triton_impl.nearest_code_with_stats(x, codebook, "l2")
    assert torch.equal(got[0], oracle(x, codebook, "l2"))
    assert torch.equal(got[1], expected[1])
    assert got[2].rows == 45
    assert torch.equal(got[2].reranked, expected[2].reranked)
    assert torch.equal(triton_impl.nearest_codes(x, codebook, "l2"), got[0])


def test_few_rows_share_the_codebook_between_programs() -> None:
    generator = torch.Generator().manual_seed(2)
    x, codebook = (torch.randn(1, n, 33, generator=generator) for n in (7, 300))
    codebook[0, 290] = codebook[0, 20]
    x[0, 3] = codebook[0, 290]
    config = configs.choose(90, x.dtype, 7, 33)
    assert configs.splits_of(config, 1, 7, 300, configs.machine_of(x.device).processors) > 1
    codes = ops.nearest_code(x[0], codebook[0])
    assert torch.equal(codes, oracle(x, codebook, "l2")[0])
    assert codes[3] == 20, "the lowest id wins across programs"


def test_a_rows_code_does_not_depend_on_its_batch() -> None:
    x, codebook = hostile_searches(torch.float32)["near duplicates"]
    together = ops.nearest_code(x[0], codebook[0])
    apart = torch.cat([ops.nearest_code(row[None], codebook[0]) for row in x[0, :6]])
    assert torch.equal(together[:6], apart)


def test_strided_rows() -> None:
    x, codebook = torch.randn(6, 3, 20), torch.randn(8, 20)
    expected = ops.nearest_code(x[:, 1].contiguous(), codebook)
    assert torch.equal(ops.nearest_code(x[:, 1], codebook), expected)
    every_other = x[:, 1, ::2], codebook[:, ::2]
    expected = oracle(every_other[0][None], every_other[1][None], "l2")[0]
    assert torch.equal(ops.nearest_code(*every_other), expected)
