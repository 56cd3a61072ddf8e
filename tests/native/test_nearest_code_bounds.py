"""The screens of nearest_code: exact on hostile data, with bounds that are needed and not slack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native.nearest_code import nearest_code, nearest_code_with_stats

METRICS = ("l2", "cosine", "dot")
# Rows enough for the codebook to be packed and screened, and not a multiple of any tile.
ROWS = 61


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return nearest_code(x[None], codebook[None], metric)[0][0]


def assert_exact(x: Tensor, codebook: Tensor, metric: str) -> None:
    """The codes are those of the same input searched in float64, which uses no screen."""
    expected = codes_of(x.double(), codebook.double(), metric)
    assert torch.equal(codes_of(x, codebook, metric), expected)


def clustered(rows: int, num_codes: int, dim: int, spread: float) -> tuple[Tensor, Tensor]:
    centres = 3 * normal(7, dim, seed=1)
    which = torch.randint(7, (num_codes,), generator=torch.Generator().manual_seed(2))
    codebook = centres[which] + spread * normal(num_codes, dim, seed=3)
    return centres[which[:rows] % 7] + spread * normal(rows, dim, seed=4), codebook


def random_data() -> tuple[Tensor, Tensor]:
    return normal(ROWS, 130), normal(300, 130, seed=1)


def far_clusters() -> tuple[Tensor, Tensor]:
    return clustered(ROWS, 300, 130, 1e-2)


def close_clusters() -> tuple[Tensor, Tensor]:
    return clustered(ROWS, 300, 130, 1e-6)


def duplicates() -> tuple[Tensor, Tensor]:
    return normal(ROWS, 130), normal(11, 130, seed=1).repeat(20, 1)


def one_ulp_apart() -> tuple[Tensor, Tensor]:
    """Codes that differ from a base in the last bit of single components."""
    base = normal(130, seed=1)
    codebook = base.repeat(131, 1)
    for code in range(130):
        codebook[code, code] = torch.nextafter(base[code], torch.tensor(torch.inf))
    return base + 0.1 * normal(ROWS, 130), codebook


def midway() -> tuple[Tensor, Tensor]:
    """Rows within a rounding of the midpoint of two codes."""
    codebook = normal(300, 130, seed=1)
    return (codebook[:ROWS] + codebook[ROWS : 2 * ROWS]) / 2, codebook


def zeros() -> tuple[Tensor, Tensor]:
    codebook = normal(70, 130, seed=1)
    codebook[5:9] = 0
    return torch.cat([torch.zeros(20, 130), normal(41, 130)]), codebook


def subnormal() -> tuple[Tensor, Tensor]:
    return 1e-39 * normal(ROWS, 130), 1e-39 * normal(90, 130, seed=1)


def partly_subnormal() -> tuple[Tensor, Tensor]:
    """The difference between codes is all in components that the screens flush."""
    x, codebook = torch.ones(ROWS, 130), torch.ones(90, 130)
    x[:, 64:] = 1e-39 * normal(ROWS, 66)
    codebook[:, 64:] = 1e-39 * normal(90, 66, seed=1)
    return x, codebook


def huge() -> tuple[Tensor, Tensor]:
    return 3e37 * normal(ROWS, 130).clamp(-10, 10), 3e37 * normal(90, 130, seed=1).clamp(-10, 10)


def one_huge_code() -> tuple[Tensor, Tensor]:
    codebook = normal(300, 130, seed=1)
    codebook[17] = 3e38
    return normal(ROWS, 130), codebook


def at_bfloat16_overflow() -> tuple[Tensor, Tensor]:
    """Values that float32 holds and bfloat16 rounds to infinity."""
    largest = torch.finfo(torch.float32).max
    x = normal(ROWS, 130).sign() * largest
    return x, torch.cat([x[:40], normal(50, 130, seed=1)])


DATA = (
    random_data,
    far_clusters,
    close_clusters,
    duplicates,
    one_ulp_apart,
    midway,
    zeros,
    subnormal,
    partly_subnormal,
    huge,
    one_huge_code,
    at_bfloat16_overflow,
)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("data", DATA, ids=lambda data: data.__name__)
def test_hostile_data(isa: str, metric: str, data) -> None:
    assert_exact(*data(), metric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("data", DATA[:7], ids=lambda data: data.__name__)
def test_hostile_data_in_half_precision(isa: str, dtype: torch.dtype, data) -> None:
    x, codebook = data()
    assert_exact(x.to(dtype), codebook.to(dtype), "l2")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [8.0, 1e3, 1e6])
def test_data_far_from_the_origin(isa: str, metric: str, offset: float) -> None:
    x, codebook = random_data()
    assert_exact(x + offset, codebook + offset, metric)


@pytest.mark.parametrize(
    ("num_codes", "dim"),
    [
        *((k, 40) for k in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129, 1000)),
        *((70, d) for d in (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 255, 257, 1023, 1025, 2049)),
        (8192, 5),
        (3, 4096),
        (1, 1),
    ],
)
def test_sizes(isa: str, num_codes: int, dim: int) -> None:
    x, codebook = normal(37, dim), normal(num_codes, dim, seed=1)
    assert_exact(x, codebook, "l2")
    assert_exact(x, codebook, "cosine")


def test_rows_that_are_not_finite_leave_the_others_alone(isa: str) -> None:
    x, codebook = random_data()
    expected = codes_of(x, codebook, "l2")
    x[3, 7], x[20, 0], x[60, 129] = torch.nan, torch.inf, -torch.inf
    codebook = torch.cat([codebook, codebook[:3]])
    codebook[300, 5], codebook[301, 0], codebook[302, 64] = torch.nan, torch.inf, -torch.inf
    codes = codes_of(x, codebook, "l2")
    expected[[3, 20, 60]] = -1
    assert torch.equal(codes, expected)


def test_few_rows_are_searched_alike(isa: str) -> None:
    x, codebook = random_data()
    for metric in METRICS:
        whole = nearest_code(x[None], codebook[None], metric)
        for rows in (1, 7, 15, 16, 17):
            part = nearest_code(x[None, :rows], codebook[None], metric)
            assert torch.equal(part[0], whole[0][:, :rows])
            assert torch.equal(part[1], whole[1][:, :rows])


# --- The bounds are attained: whoever shrinks them loses codes. ---
#
# 1 + 2^-8 and 1 + 3 2^-8 lie midway between bfloat16 values; the first rounds down and the second
# up. In 32 components each, along +1 and -1, the rounding errors all point along the vector they
# are multiplied with, as in the Cauchy-Schwarz inequality's case of equality.
_DOWN, _UP = 1 + 2**-8, 1 + 3 * 2**-8
# Outweighs 32 (_DOWN - _UP) by a little: a bfloat16 number.
_BALANCE = 32 * 2**-7 + 2**-9


def ramp(first: float, second: float, last: float) -> Tensor:
    return torch.tensor([first] * 32 + [second] * 32 + [last])


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_the_bound_on_rounding_rows_is_attained(isa: str, metric: str) -> None:
    x = ramp(_DOWN, _UP, 1.0).repeat(ROWS, 1)
    code = ramp(1.0, -1.0, _BALANCE)
    codebook = torch.stack([-code, code])
    # As bfloat16 rounds it, the row is nearer to the wrong code by 98 % of twice the bound.
    rounded = x.bfloat16().double() @ codebook.double().T
    bound = (x - x.bfloat16().float()).norm(dim=1).max() * code.norm()
    assert (rounded[:, 0] - rounded[:, 1]).min() > 0.98 * 2 * bound
    assert codes_of(x, codebook, metric).tolist() == [1] * ROWS


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_the_bound_on_rounding_codes_is_attained(isa: str, metric: str) -> None:
    x = torch.ones(ROWS, 65)
    code = ramp(_DOWN, -_UP, _BALANCE)
    codebook = torch.stack([-code, code])
    rounded = x.double() @ codebook.bfloat16().double().T
    bound = (code - code.bfloat16().float()).norm() * x.norm(dim=1).max()
    assert (rounded[:, 0] - rounded[:, 1]).min() > 0.98 * 2 * bound
    assert codes_of(x, codebook, metric).tolist() == [1] * ROWS


def test_the_bound_on_accumulation_is_needed(isa: str) -> None:
    """Every number is exact in bfloat16, and 99 of the true score is lost beside 2^24."""
    x = torch.full((200,), 0.5)
    x[0], x[199] = 4096, 1
    drowned = torch.ones(200)
    drowned[0], drowned[199] = 4096, 0
    kept = torch.zeros(200)
    kept[0], kept[199] = 4096, 64
    # Their negatives keep the mean at zero.
    codebook = torch.stack([kept, drowned, -kept, -drowned])
    assert codes_of(x.repeat(ROWS, 1), codebook, "dot").tolist() == [1] * ROWS


def test_the_bound_on_flushed_results_is_needed(isa: str) -> None:
    """Products of 2^-133 vanish where results below the normal range are flushed to zero."""
    x = torch.full((200,), 2.0**-63)
    many, single = torch.full((200,), 2.0**-70), torch.zeros(200)
    single[0] = 2.0**-63
    codebook = torch.stack([single, many, -single, -many])
    assert codes_of(x.repeat(ROWS, 1), codebook, "dot").tolist() == [1] * ROWS


def test_the_bound_on_flushed_operands_is_needed(isa: str) -> None:
    """bfloat16 multiplication reads a code of subnormal components as zero; long rows see it."""
    x = torch.full((200,), 2.0**20)
    many, single = torch.full((200,), 2.0**-127), torch.zeros(200)
    single[0] = 2.0**-120
    codebook = torch.stack([single, many, -single, -many])
    assert codes_of(x.repeat(ROWS, 1), codebook, "dot").tolist() == [1] * ROWS


def test_the_bound_on_squares_rounded_to_zero_is_needed(isa: str) -> None:
    """200 squares of 2^-151 are more than one of 2^-144, but nothing in float32."""
    many, single = torch.full((200,), 2.0**-75.5), torch.zeros(200)
    single[0] = 2.0**-72
    assert (
        codes_of(torch.zeros(ROWS, 200), torch.stack([many, single]), "l2").tolist() == [1] * ROWS
    )


# --- How much is looked at twice. ---


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_most_rows_of_normal_data_are_decided_early(isa: str, offset: float) -> None:
    """A float32 screen leaves next to nothing, and a bfloat16 screen a few codes of some rows.

    The highest of 128 scores of standard deviation sqrt(D + D / 2) = 55 leads by 16 on average,
    roughly exponentially; bfloat16 loses 0.17 % of a vector's length, so twice the bound is about
    4 * 0.0017 * 2048 = 14: 1 - exp(-14 / 16) = 58 % of the rows keep a second code. Without the
    subtraction of the mean, an offset of 1000 would leave every row.
    """
    x, codebook = normal(500, 2048) + offset, normal(128, 2048, seed=1) + offset
    _, _, stats = nearest_code_with_stats(x[None], codebook[None], "l2")
    assert stats.rows == 500
    assert stats.fraction_reranked < (0.7 if isa == "avx512bf16" else 0.03)
    assert stats.in_float64 <= stats.reranked
    assert stats.rescreened + stats.in_float64 < 0.02 * stats.rows
    if isa == "avx512bf16":
        assert stats.fraction_reranked > 0.4


def stray_code(codebook: Tensor) -> Tensor:
    codebook = codebook.clone()
    codebook[5] *= 1e6
    return codebook


def uneven_codes(codebook: Tensor) -> Tensor:
    return codebook * torch.exp(normal(len(codebook), 1, seed=2))


@pytest.mark.parametrize("change", [stray_code, uneven_codes])
def test_a_code_pays_only_for_its_own_length(isa: str, change) -> None:
    """The bound of each code is its own, and the centre is that of the usual codes."""
    x, codebook = normal(500, 256), change(normal(128, 256, seed=1))
    codes, _, stats = nearest_code_with_stats(x[None], codebook[None], "l2")
    assert torch.equal(codes[0], codes_of(x.double(), codebook.double(), "l2"))
    # As for codes of even length; with one bound for all every row is left with half the codebook.
    assert stats.fraction_reranked < (0.5 if isa == "avx512bf16" else 0.02)
    assert stats.rescreened == 0


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_rows_far_from_the_origin_are_centred_for_every_metric(isa: str, metric: str) -> None:
    x, codebook = normal(500, 256) + 8, normal(128, 256, seed=1) + 8
    codes, _, stats = nearest_code_with_stats(x[None], codebook[None], metric)
    assert torch.equal(codes[0], codes_of(x.double(), codebook.double(), metric))
    # As at the origin. Not centred, cosines leave 99 % of the rows.
    assert stats.fraction_reranked < (0.6 if isa == "avx512bf16" else 0.05)
    assert stats.rescreened == 0


def test_codes_a_bfloat16_screen_cannot_tell_apart_are_screened_again(isa: str) -> None:
    x, codebook = clustered(ROWS, 300, 130, 1e-3)
    codes, _, stats = nearest_code_with_stats(x[None], codebook[None], "l2")
    assert torch.equal(codes[0], codes_of(x.double(), codebook.double(), "l2"))
    assert stats.rescreened <= stats.reranked <= stats.rows
    if isa == "avx512bf16":
        assert stats.rescreened > 0
    else:
        assert stats.rescreened == 0


def test_float64_needs_no_screen() -> None:
    x, codebook = random_data()
    _, _, stats = nearest_code_with_stats(x[None].double(), codebook[None].double(), "l2")
    assert (stats.rows, stats.reranked, stats.rescreened, stats.in_float64) == (ROWS, 0, 0, 0)
    assert stats.fraction_reranked == 0.0


def test_instruction_sets_agree_on_hostile_data(every_isa: list[str]) -> None:
    for data in DATA:
        x, codebook = data()
        results = []
        for name in every_isa:
            _C.select_isa(name)
            results.append(nearest_code(x[None], codebook[None], "l2"))
        for codes, distance in results[1:]:
            assert torch.equal(codes, results[0][0])
            assert torch.equal(distance, results[0][1])
