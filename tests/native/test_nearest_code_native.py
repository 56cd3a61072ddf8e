"""nearest_code in C++: exactly float64's choice, however the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latent_rl import _C
from latent_rl.native.nearest_code import nearest_code

METRICS = ("l2", "cosine", "dot")


def oracle(x: np.ndarray, codebook: np.ndarray, metric: str) -> np.ndarray:
    """Distances [N, K] in float64."""
    x, codebook = x.astype(np.float64), codebook.astype(np.float64)
    if metric == "l2":
        return ((x[:, None] - codebook[None]) ** 2).sum(-1)
    dots = (x[:, None] * codebook[None]).sum(-1)
    if metric == "dot":
        return -dots
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(codebook, axis=1)[None]
    return 1 - dots / norms


def run(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes, distance = nearest_code(x[None], codebook[None], metric)
    return codes[0], distance[0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("rows", "num_codes", "dim"),
    [(1, 1, 1), (5, 3, 2), (37, 65, 16), (100, 33, 65), (13, 130, 300), (200, 7, 1025)],
)
def test_float32_codes_are_those_of_float64(
    isa: str, metric: str, rows: int, num_codes: int, dim: int
) -> None:
    generator = torch.Generator().manual_seed(rows + dim)
    x = torch.randn(rows, dim, generator=generator)
    codebook = torch.randn(num_codes, dim, generator=generator)
    codes, distance = run(x, codebook, metric)
    expected = oracle(x.numpy(), codebook.numpy(), metric)
    assert codes.numpy().tolist() == expected.argmin(1).tolist()
    # The distance is computed in float64 and rounded once to float32.
    np.testing.assert_allclose(distance.numpy(), expected.min(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-6])
def test_codes_that_float32_cannot_tell_apart(isa: str, metric: str, spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(1, 257, generator=generator) * 3
    codebook = centre + spread * torch.randn(90, 257, generator=generator)
    x = centre + spread * torch.randn(300, 257, generator=generator)
    expected = run(x.double(), codebook.double(), metric)[0]
    assert torch.equal(run(x, codebook, metric)[0], expected)
    plain = {"l2": torch.cdist(x, codebook), "dot": -(x @ codebook.T)}.get(metric)
    if plain is not None and spread < 1e-4:
        # The test is not vacuous: plain float32 gets rows wrong here.
        assert not torch.equal(plain.argmin(1), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e18, 1e30, 3e38])
def test_scales_at_the_ends_of_float32(isa: str, metric: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(50, 33, generator=generator) * scale
    codebook = torch.rand(40, 33, generator=generator) * scale
    assert torch.equal(run(x, codebook, metric)[0], run(x.double(), codebook.double(), metric)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_is_exact_for_the_rounded_input(
    isa: str, dtype: torch.dtype, metric: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(80, 70, generator=generator).to(dtype)
    codebook = torch.randn(50, 70, generator=generator).to(dtype)
    expected = run(x.double(), codebook.double(), metric)[0]
    assert torch.equal(run(x, codebook, metric)[0], expected)


def test_every_float16_value_is_read_right(isa: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16)[:, None]
    distance = run(x, torch.zeros(1, 1, dtype=torch.float16), "l2")[1]
    expected = (x[:, 0].double() ** 2).float()
    expected[~x[:, 0].isfinite()] = torch.nan
    torch.testing.assert_close(distance, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
def test_the_lowest_id_wins_exact_ties(isa: str, metric: str) -> None:
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(9, 40, generator=generator)
    codebook = base.repeat(11, 1)
    x = torch.randn(64, 40, generator=generator)
    codes = run(x, codebook, metric)[0]
    assert int(codes.max()) < 9
    assert torch.equal(codes, run(x, base, metric)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_and_codes_that_are_not_finite(isa: str, dtype: torch.dtype) -> None:
    x = torch.ones(5, 20, dtype=dtype)
    x[1, 3], x[2, 0], x[3, 19] = torch.nan, torch.inf, -torch.inf
    codebook = torch.zeros(4, 20, dtype=dtype)
    codebook[0, 7], codebook[1, 0] = torch.nan, torch.inf
    codes, distance = run(x, codebook, "l2")
    assert codes.tolist() == [2, -1, -1, -1, 2]
    assert distance.isnan().tolist() == [False, True, True, True, False]
    assert run(x, codebook[:2], "l2")[0].tolist() == [-1] * 5


def test_a_row_does_not_depend_on_threads_or_neighbours(isa: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(700, 130, generator=generator)
    codebook = torch.randn(150, 130, generator=generator)
    torch.set_num_threads(1)
    codes, distance = run(x, codebook, "l2")
    for count in (2, 3):
        torch.set_num_threads(count)
        again = run(x, codebook, "l2")
        assert torch.equal(codes, again[0])
        assert torch.equal(distance, again[1])
    for begin in (0, 1, 13, 699):
        part = run(x[begin : begin + 17], codebook, "l2")
        assert torch.equal(codes[begin : begin + 17], part[0])
        assert torch.equal(distance[begin : begin + 17], part[1])


def test_instruction_sets_agree_bit_for_bit(every_isa: list[str]) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(90, 77, generator=generator)
    codebook = torch.randn(60, 77, generator=generator)
    results = []
    for name in every_isa:
        _C.select_isa(name)
        results.append(run(x, codebook, "cosine"))
    for codes, distance in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(distance, results[0][1])


def test_strides_groups_and_empty_input() -> None:
    generator = torch.Generator().manual_seed(7)
    wide = torch.randn(3, 40, 2, 24, generator=generator)
    codebook = torch.randn(3, 30, 24, generator=generator)
    view = wide[:, :, 1]
    expected = nearest_code(view.contiguous(), codebook, "l2")
    for same in (view, view.transpose(1, 2).contiguous().transpose(1, 2)):
        codes, distance = nearest_code(same, codebook, "l2")
        assert torch.equal(codes, expected[0])
        assert torch.equal(distance, expected[1])
    assert nearest_code(view[:, :0], codebook, "l2")[0].shape == (3, 0)


def test_flushing_subnormals_in_the_caller_changes_nothing() -> None:
    x = torch.full((3, 8), 1e-40)
    codebook = torch.stack([torch.zeros(8), torch.full((8,), 1e-40)])
    torch.set_flush_denormal(True)
    try:
        codes = run(x, codebook, "l2")[0]
    finally:
        torch.set_flush_denormal(False)
    assert codes.tolist() == [1, 1, 1]
