"""Codebooks that are moved, compiled, reloaded, and that must revive many codes at once."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latent_rl.nn import EmaCodebook, ResidualQuantizer, VectorQuantizer


def rows(n: int, d: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def trained(metric: str = "l2") -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(EmaCodebook(8, 4, metric=metric, decay=0.99)).train()
    for step in range(3):
        quantizer(rows(60, seed=step), seed=0)
    return quantizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_averages_stay_float32_and_go_on_learning(dtype) -> None:
    still = trained()
    moved = copy.deepcopy(still).to(dtype)
    assert moved.codebook.weight.dtype == dtype
    for name in ("ema_counts", "ema_sums"):
        before, after = getattr(still.codebook, name), getattr(moved.codebook, name)
        assert after.dtype == torch.float32
        assert torch.equal(after, before), name
    moved(rows(60, seed=9).to(dtype), seed=0)
    assert moved.codebook.weight.dtype == dtype
    assert not torch.equal(moved.codebook.ema_sums, still.codebook.ema_sums)
    means = moved.codebook.ema_sums / moved.codebook.ema_counts[:, None]
    assert torch.equal(moved.codebook.weight, means.to(dtype))


def test_a_reloaded_codebook_goes_on_alike() -> None:
    first, second = trained(), VectorQuantizer(EmaCodebook(8, 4)).train()
    second.load_state_dict(first.state_dict())
    for quantizer in (first, second):
        quantizer(rows(60, seed=9), seed=0)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_evaluation_compiles_whole(metric) -> None:
    quantizer, x = trained(metric).eval(), rows(20, seed=9)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, 0), quantizer(x, 0), strict=True):
        torch.testing.assert_close(found, expected)


def test_residual_levels_compile_whole() -> None:
    model, x = ResidualQuantizer([trained(), trained()]).eval(), rows(20, seed=9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, 0).codes, model(x, 0).codes)


def abandoned(k: int) -> EmaCodebook:
    """One code at the origin, all others far from every row and long unused."""
    book = EmaCodebook(k, 4, decay=0.5, dead_below=0.1, kmeans_iterations=0)
    centers = torch.full((k, 4), 1e3)
    centers[0] = 0
    book._set(centers, torch.full((k,), 1e-3))
    return book


def test_revived_codes_take_rows_of_their_own() -> None:
    book, x = abandoned(32), rows(40)
    VectorQuantizer(book).train()(x, seed=0)
    assert all((x == code).all(1).any() for code in book.weight[1:])
    assert book.weight.unique(dim=0).shape[0] == 32


def test_with_fewer_rows_than_dead_codes_the_rest_wait() -> None:
    book, x = abandoned(8), rows(3)
    quantizer = VectorQuantizer(book).train()
    quantizer(x, seed=0)
    assert int((book.weight > 900).all(1).sum()) == 4
    for step in range(4):
        quantizer(rows(30, seed=step), seed=0)
    assert int((book.weight > 900).all(1).sum()) == 0


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40), decay=st.floats(0.0, 0.99), seed=st.integers(0, 1000),
    metric=st.sampled_from(["l2", "cosine"]),
)  # fmt: skip
def test_the_order_of_rows_has_no_say(n, decay, seed, metric) -> None:
    torch.manual_seed(seed)
    first = EmaCodebook(5, 3, metric=metric, decay=decay, dead_below=0, kmeans_iterations=0)
    second, x = copy.deepcopy(first), torch.randn(n, 3)
    VectorQuantizer(first).train()(x, seed=0)
    VectorQuantizer(second).train()(x[torch.randperm(n)], seed=0)
    # Counts are whole numbers; only the order of float32 sums differs.
    assert torch.equal(first.ema_counts, second.ema_counts)
    torch.testing.assert_close(first.ema_sums, second.ema_sums, rtol=1e-5, atol=1e-5)
    total = decay * 5 + (1 - decay) * n
    assert first.ema_counts.sum().item() == pytest.approx(total, rel=1e-5)
