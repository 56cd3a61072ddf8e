"""The cross-modal projector and its likelihood."""

from __future__ import annotations

import math

import pytest
import torch

from latent_rl.nn import CrossModalProjector, Gaussian, gaussian_nll


def test_untrained_mean_is_the_identity_both_ways() -> None:
    projector = CrossModalProjector(8)
    e = torch.randn(3, 5, 8)
    assert torch.equal(projector(e), e)
    assert torch.equal(projector.to_text(e).mean, e)


def test_log_variance_is_bounded() -> None:
    projector = CrossModalProjector(8)
    logvar = projector.to_image_text(1000 * torch.randn(50, 8)).logvar
    assert logvar.abs().max() <= 1
    assert logvar.std() > 0


def test_nll_by_hand() -> None:
    prediction = Gaussian(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, math.log(2.0)]]))
    nll = gaussian_nll(prediction, torch.tensor([[3.0, 2.5]]))
    # (1-3)^2 * 1 + 0  +  (2-2.5)^2 / 2 + log 2
    assert nll.shape == (1,)
    assert nll.item() == pytest.approx(4.0 + 0.125 + math.log(2.0), rel=1e-6)


def test_learns_a_shift() -> None:
    torch.manual_seed(0)
    projector = CrossModalProjector(8)
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-2)
    text = torch.randn(256, 8)
    image_text = text + torch.tanh(text @ torch.randn(8, 8)) * 0.5 + 1.0
    before = (projector(text) - image_text).square().mean().item()
    for _ in range(200):
        loss = gaussian_nll(projector.to_image_text(text), image_text).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (projector(text) - image_text).square().mean().item() < 0.2 * before


def test_states_of_another_dtype_are_cast() -> None:
    assert CrossModalProjector(8)(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32
