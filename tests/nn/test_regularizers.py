"""Orthogonality and usage: values known by hand, gradients, and what descending them does."""

import math

import pytest
import torch

from latent_rl.nn import Codebook, EmaCodebook, VectorQuantizer, orthogonality_loss, usage_loss
from latent_rl.nn import regularizers as module


def test_orthogonality_by_hand() -> None:
    assert orthogonality_loss(torch.eye(3) * 7).item() == pytest.approx(0, abs=1e-7)
    assert orthogonality_loss(torch.tensor([[1.0, 0], [-3, 0]])).item() == pytest.approx(1)
    # cos 60 degrees, squared.
    pair = torch.tensor([[1.0, 0], [0.5, math.sqrt(0.75)]])
    assert orthogonality_loss(pair).item() == pytest.approx(0.25)
    assert orthogonality_loss(torch.randn(1, 4)).item() == 0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_both_gram_matrices_give_the_mean_squared_cosine(shape) -> None:
    codes = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    cosines = torch.nn.functional.cosine_similarity(codes[:, None], codes[None], dim=-1)
    off = cosines.square().masked_fill(torch.eye(len(codes)).bool(), 0)
    expected = off.sum() / (len(codes) * (len(codes) - 1))
    torch.testing.assert_close(orthogonality_loss(codes), expected, rtol=1e-5, atol=1e-6)


def test_descending_orthogonality_makes_codes_orthogonal() -> None:
    torch.manual_seed(0)
    codes = torch.randn(6, 6, requires_grad=True)
    optimizer = torch.optim.Adam([codes], lr=0.05)
    before = orthogonality_loss(codes).item()
    for _ in range(200):
        optimizer.zero_grad()
        orthogonality_loss(codes).backward()
        optimizer.step()
    assert orthogonality_loss(codes).item() < 0.01 * before


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_orthogonality_gradient(shape) -> None:
    codes = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(orthogonality_loss, codes.requires_grad_())


def test_usage_by_hand() -> None:
    codes = torch.tensor([[0.0], [10.0]])
    even = torch.tensor([[0.0], [10.0]])
    assert usage_loss(even, codes).item() == pytest.approx(0, abs=1e-6)
    assert usage_loss(even[:1].repeat(5, 1), codes).item() == pytest.approx(math.log(2))
    # One row half-way between both is shared evenly.
    assert usage_loss(torch.tensor([[5.0]]), codes).item() == pytest.approx(0, abs=1e-6)


def test_usage_in_chunks_equals_the_whole_and_its_gradient(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 4, generator=generator, requires_grad=True)
    codes = torch.randn(6, 4, generator=generator, requires_grad=True)

    def both() -> list[torch.Tensor]:
        loss = usage_loss(x, codes, temperature=0.7)
        return [loss.detach(), *torch.autograd.grad(loss, (x, codes))]

    whole = both()
    monkeypatch.setattr(module, "_CHUNK_ROWS", 10)
    for part, expected in zip(both(), whole, strict=True):
        torch.testing.assert_close(part, expected)
    soft = (-torch.cdist(x, codes).square() / 0.7).softmax(-1).mean(0)
    expected = math.log(6) - torch.special.entr(soft).sum()
    torch.testing.assert_close(whole[0], expected.detach(), rtol=1e-4, atol=1e-5)


def test_usage_leaves_broken_rows_out_and_stands_without_rows() -> None:
    codes = torch.randn(4, 2, requires_grad=True)
    x = torch.tensor([[0.3, 0.1], [torch.nan, 0.0]])
    torch.testing.assert_close(usage_loss(x, codes), usage_loss(x[:1], codes))
    usage_loss(x[:0], codes).backward()
    assert (codes.grad == 0).all()
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        usage_loss(x, codes, temperature=0.0)


def test_the_quantizer_adds_what_has_a_weight() -> None:
    torch.manual_seed(0)
    x, book = torch.randn(20, 4), Codebook(8, 4)
    plain = VectorQuantizer(book)(x, 0).loss
    full = VectorQuantizer(book, orthogonality=0.5, usage=2.0, usage_temperature=3.0)(x, 0).loss
    added = 0.5 * orthogonality_loss(book.weight) + 2 * usage_loss(x, book.weight, temperature=3.0)
    torch.testing.assert_close(full, plain + added)
    full.backward()
    assert book.weight.grad is not None
    # Rows are moved towards neglected codes of a codebook that follows them.
    rows = x.clone().requires_grad_()
    VectorQuantizer(EmaCodebook(8, 4), commitment=0.0, usage=1.0).eval()(rows, 0).loss.backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0


def test_weights_that_cannot_act_are_refused() -> None:
    with pytest.raises(ValueError, match="orthogonality needs a codebook that learns by gradient"):
        VectorQuantizer(EmaCodebook(4, 2), orthogonality=0.1)
    with pytest.raises(ValueError, match=r"must be >= 0, got 0\.25, 0\.0 and -1\.0"):
        VectorQuantizer(Codebook(4, 2), usage=-1.0)
