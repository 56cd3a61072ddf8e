"""Token cross-entropy on response positions."""

from __future__ import annotations

import pytest
import torch

from latent_rl.train import token_loss
from latent_rl.train.token_loss import next_tokens, response_mask, token_cross_entropy
from tests.train.tiny_world import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()[0]


def problem(model, rows=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, model.config.get_text_config().hidden_size, generator=generator)
    vocabulary = model.backbone.get_output_embeddings().weight.shape[0]
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden.requires_grad_(), targets


def plain(model, hidden, targets):
    loss = torch.nn.functional.cross_entropy(model.lm_logits(hidden).float(), targets)
    return loss, torch.autograd.grad(loss, hidden)[0]


def test_positions_are_shifted_by_one():
    labels = torch.tensor([[-100, -100, 7, 8, -100]])
    assert next_tokens(labels).tolist() == [[-100, 7, 8, -100, -100]]
    assert response_mask(labels).tolist() == [[False, True, True, False, False]]


@pytest.mark.parametrize("rows_per_chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("head_trains", [False, True])
def test_chunks_equal_the_plain_loss(model, monkeypatch, rows_per_chunk, head_trains):
    head = model.backbone.get_output_embeddings().weight
    head.requires_grad_(head_trains)
    try:
        hidden, targets = problem(model)
        expected_loss, expected_grad = plain(model, hidden, targets)
        monkeypatch.setattr(token_loss, "LOGITS_PER_CHUNK", rows_per_chunk * head.shape[0])
        loss = token_cross_entropy(model, hidden, targets)
        (2 * loss).backward()
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(hidden.grad, 2 * expected_grad)
        assert (head.grad is not None) == head_trains
    finally:
        head.grad = None
        head.requires_grad_(False)


def test_no_chunk_holds_more_logits_than_allowed(model, monkeypatch):
    seen = []
    logits = model.lm_logits
    monkeypatch.setattr(model, "lm_logits", lambda x: (seen.append(len(x)), logits(x))[1])
    vocabulary = model.backbone.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(token_loss, "LOGITS_PER_CHUNK", 5 * vocabulary + 3)
    hidden, targets = problem(model)
    token_cross_entropy(model, hidden, targets).backward()
    assert max(seen) == 5
    assert sum(seen) == 37  # each row's logits exactly once, backward included


def test_no_rows_give_zero_with_a_gradient(model):
    hidden, targets = problem(model, rows=0)
    loss = token_cross_entropy(model, hidden, targets)
    assert loss.item() == 0
    loss.backward()


def test_liger_says_why_not(model):
    hidden, _ = problem(model)
    embeddings = model.backbone.get_output_embeddings()
    assert "CUDA" in token_loss.liger_why_not(model, embeddings, hidden)


def test_shape_errors(model):
    hidden, targets = problem(model)
    with pytest.raises(ValueError, match=r"hidden must be \[M, H\]"):
        token_cross_entropy(model, hidden[None], targets)
    with pytest.raises(ValueError, match="targets"):
        token_cross_entropy(model, hidden, targets[:-1])
