"""Quantizers: values, gradients, losses, and the protocol both keep."""

from __future__ import annotations

import math

import pytest
import torch

from latent_rl.nn import (
    Codebook,
    EmaCodebook,
    GumbelQuantizer,
    Quantizer,
    VectorQuantizer,
    perplexity,
)


def gumbel(k: int = 5, d: int = 3, **settings: float) -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(Codebook(k, d), **settings)


def test_both_keep_the_protocol() -> None:
    both: tuple[Quantizer, ...] = (VectorQuantizer(EmaCodebook(5, 3)), gumbel())
    assert [quantizer.feature_dim for quantizer in both] == [3, 5]
    for quantizer in both:
        features = torch.randn(2, quantizer.feature_dim)
        assert quantizer.codebook.num_codes == quantizer.scores(features).shape[1]
        assert torch.equal(quantizer.scores(features).argmax(1), quantizer.codes(features))
        assert quantizer(features, 0).codes.shape == (2,)


def test_vq_value_is_the_code_and_gradient_goes_straight_through() -> None:
    quantizer = VectorQuantizer(Codebook(4, 3), commitment=0.0).eval()
    x = torch.randn(6, 3, requires_grad=True)
    out = quantizer(x, seed=0)
    torch.testing.assert_close(out.vectors, quantizer.codebook.weight[out.codes])
    pull = torch.randn(6, 3)
    (out.vectors * pull).sum().backward()
    torch.testing.assert_close(x.grad, pull)
    assert quantizer.codebook.weight.grad is None or not quantizer.codebook.weight.grad.any()


def test_vq_losses_by_hand() -> None:
    book = Codebook(2, 1)
    book.weight.data = torch.tensor([[0.0], [10.0]])
    x = torch.tensor([[1.0], [8.0]], requires_grad=True)
    out = VectorQuantizer(book, commitment=0.25)(x, seed=0)
    mean_square = (1.0 + 4.0) / 2
    assert out.loss.item() == pytest.approx(0.25 * mean_square + mean_square)
    out.loss.backward()
    torch.testing.assert_close(x.grad, 0.25 * torch.tensor([[1.0], [-2.0]]))
    torch.testing.assert_close(book.weight.grad, torch.tensor([[-1.0], [2.0]]))


def test_ema_quantizer_has_the_commitment_loss_alone() -> None:
    book = EmaCodebook(2, 1, kmeans_iterations=0)
    book._set(torch.tensor([[0.0], [10.0]]), torch.ones(2))
    out = VectorQuantizer(book, commitment=0.25).train()(torch.tensor([[1.0], [8.0]]), seed=0)
    assert out.loss.item() == pytest.approx(0.25 * 2.5)


def test_backward_survives_the_moving_average() -> None:
    quantizer = VectorQuantizer(EmaCodebook(4, 3)).train()
    x = torch.randn(20, 3, requires_grad=True)
    out = quantizer(x, seed=0)
    again = quantizer(x.detach(), seed=0)  # moves the codes before the backward pass
    (out.vectors.sum() + out.loss + again.loss).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_vq_scores_rank_codes_as_distances_do() -> None:
    quantizer = VectorQuantizer(Codebook(7, 3)).eval()
    x = torch.randn(2, 9, 3)
    scores = quantizer.scores(x)
    assert scores.shape == (2, 9, 7)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(2, 9))
    assert torch.equal(scores.argmax(-1), quantizer.codes(x))
    distance = torch.cdist(x, quantizer.codebook.weight).square()
    torch.testing.assert_close(scores, (-distance).log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_gumbel_noise_is_seeded_and_off_in_eval() -> None:
    quantizer = gumbel().train()
    logits = torch.randn(200, 5)
    first, same, other = (quantizer(logits, seed=s).codes for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    quantizer.eval()
    assert torch.equal(quantizer(logits, seed=1).codes, logits.argmax(-1))
    assert torch.equal(quantizer.codes(logits), logits.argmax(-1))


def test_gumbel_codes_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    codes = gumbel(tau=2.0).train()(logits.expand(40_000, 5), seed=3).codes
    # With noise added to the logits, argmax samples softmax(logits) whatever tau is; 40,000
    # draws have a standard error below .0025.
    share = torch.bincount(codes, minlength=5) / codes.numel()
    torch.testing.assert_close(share, logits.softmax(-1), rtol=0, atol=0.012)


def test_gumbel_gradients_reach_logits_and_codebook() -> None:
    quantizer = gumbel().train()
    logits = torch.randn(30, 5, requires_grad=True)
    out = quantizer(logits, seed=0)
    torch.testing.assert_close(out.vectors, quantizer.codebook.weight[out.codes])
    out.vectors.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    used = torch.bincount(out.codes, minlength=5) > 0
    grad = quantizer.codebook.weight.grad
    assert grad is not None
    assert torch.equal(grad.abs().sum(-1) > 0, used)


def test_gumbel_loss_raises_the_marginal_entropy() -> None:
    collapsed = torch.zeros(64, 5)
    collapsed[:, 0] = 3.0
    collapsed.requires_grad_()
    out = gumbel(marginal_entropy=0.5).train()(collapsed, seed=0)
    marginal = torch.special.entr(collapsed.detach().softmax(-1)[0]).sum()
    assert out.loss.item() == pytest.approx(-0.5 * marginal.item(), rel=1e-5)
    out.loss.backward()
    assert collapsed.grad is not None
    # A descent step lowers the overused code's logit.
    assert (collapsed.grad[:, 0] > 0).all()


def test_gumbel_entropy_in_nats() -> None:
    out = gumbel().train()(torch.zeros(3, 5), seed=0)
    torch.testing.assert_close(out.entropy, torch.full((3,), math.log(5)))


def test_perplexity_of_counts() -> None:
    assert perplexity(torch.tensor([8, 0, 0, 0])).item() == pytest.approx(1.0)
    assert perplexity(torch.tensor([2, 2, 2, 2])).item() == pytest.approx(4.0)
    assert perplexity(torch.zeros(4, dtype=torch.int64)).item() == pytest.approx(1.0)


def test_tau_must_be_positive() -> None:
    with pytest.raises(ValueError, match="tau must be > 0, got 0"):
        gumbel(tau=0.0)
