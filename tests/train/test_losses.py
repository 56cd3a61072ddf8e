"""Policy losses: numbers worked out by hand, identities between the algorithms, masking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_rl.train.losses import (
    ALGORITHMS,
    ClipRange,
    LossSettings,
    Normaliser,
    PolicyTerms,
    algorithm,
    bnpo_loss,
    dapo_loss,
    dr_grpo_loss,
    grpo_loss,
    register_algorithm,
)

CLIP = ClipRange(0.2, 0.2)


def worked_terms(kl: bool = False) -> PolicyTerms:
    """Two completions of 3 and 1 tokens. Per token, with clip 0.2 on both sides:

    row 0, A = +1: ratios 1, 1.5 (clipped to 1.2), 0.5  ->  losses -1, -1.2, -0.5
    row 1, A = -1: ratio 0.5 (clipped to 0.8)           ->  loss 0.8
    """
    nan = math.nan
    ratios = torch.tensor([[1.0, 1.5, 0.5], [0.5, nan, nan]])
    return PolicyTerms(
        logprobs=ratios.log().requires_grad_(),
        old_logprobs=torch.zeros(2, 3),
        advantages=torch.tensor([1.0, -1.0]),
        keep_mask=torch.tensor([[True, True, True], [True, False, False]]),
        kl=torch.tensor([[0.1, 0.2, 0.3], [0.4, nan, nan]]) if kl else None,
    )


def random_terms(seed: int, lengths: list[int], shift: float = 0.5) -> PolicyTerms:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    old = -torch.rand(shape, generator=generator)
    new = old + shift * torch.randn(shape, generator=generator)
    keep = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    advantages = torch.randn(shape[0], generator=generator)
    return PolicyTerms(new.requires_grad_(), old, advantages, keep)


def all_losses(terms: PolicyTerms, max_length: int) -> dict[str, torch.Tensor]:
    normaliser = Normaliser(max_length, terms.keep_mask.sum().float())
    return {
        name: entry.loss(terms, settings=LossSettings(CLIP), normaliser=normaliser).loss
        for name, entry in ALGORITHMS.items()
    }


def test_worked_numbers():
    terms = worked_terms()
    assert grpo_loss(terms, clip=CLIP).loss.item() == pytest.approx((-0.9 + 0.8) / 2)
    assert bnpo_loss(terms, clip=CLIP).loss.item() == pytest.approx(-1.9 / 4)
    dr = dr_grpo_loss(terms, max_completion_length=10, clip=CLIP)
    assert dr.loss.item() == pytest.approx(-1.9 / 20)
    dapo = dapo_loss(terms, num_tokens=torch.tensor(8.0), clip=CLIP)
    assert dapo.loss.item() == pytest.approx(-1.9 / 8)


def test_worked_clip_shares():
    out = grpo_loss(worked_terms(), clip=CLIP)
    assert out.high_clip.item() == pytest.approx(1 / 4)
    assert out.low_clip.item() == pytest.approx(1 / 4)


def test_worked_kl_term():
    # mean KL per completion: 0.2 and 0.4; beta 0.5 adds 0.5 * (0.2 + 0.4) / 2.
    out = grpo_loss(worked_terms(kl=True), clip=CLIP, beta=0.5)
    assert out.loss.item() == pytest.approx(-0.05 + 0.15)


def test_decoupled_upper_clip():
    terms = worked_terms()
    loss = dapo_loss(terms, num_tokens=torch.tensor(4.0), clip=ClipRange(0.2, 0.4)).loss
    assert loss.item() == pytest.approx((-1 - 1.4 - 0.5 + 0.8) / 4)
    default = dapo_loss(terms, num_tokens=torch.tensor(4.0)).loss
    assert default.item() == pytest.approx((-1 - 1.28 - 0.5 + 0.8) / 4)


def test_clipped_tokens_get_no_gradient_and_masked_nan_none():
    terms = worked_terms()
    bnpo_loss(terms, clip=CLIP).loss.backward()
    # d(-ratio * A)/dlogprob = -ratio * A where not clipped.
    expected = torch.tensor([[-1.0, 0.0, -0.5], [0.0, 0.0, 0.0]]) / 4
    torch.testing.assert_close(terms.logprobs.grad, expected)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_equal_full_lengths_make_the_variants_equal(name):
    terms = random_terms(0, [5, 5, 5])
    losses = all_losses(terms, max_length=5)
    torch.testing.assert_close(losses[name], losses["grpo"])


def test_unequal_lengths_tell_the_variants_apart():
    losses = all_losses(random_terms(0, [2, 5, 4]), max_length=8)
    values = [losses[name].item() for name in ("grpo", "dr_grpo", "bnpo")]
    assert len({round(value, 4) for value in values}) == 3


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_on_policy_gradient_is_the_policy_gradient(name):
    terms = random_terms(3, [4, 4], shift=0.0)
    all_losses(terms, max_length=4)[name].backward()
    expected = -terms.advantages[:, None].expand(2, 4) / 8
    torch.testing.assert_close(terms.logprobs.grad, expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_padding_changes_nothing(seed, lengths):
    terms = random_terms(seed, lengths)
    pad = torch.nn.functional.pad
    padded = PolicyTerms(
        pad(terms.logprobs, (0, 3), value=math.nan),
        pad(terms.old_logprobs, (0, 3), value=-1e30),
        terms.advantages,
        pad(terms.keep_mask, (0, 3), value=False),
    )
    for name, loss in all_losses(padded, 9).items():
        torch.testing.assert_close(loss, all_losses(terms, 9)[name])


def test_no_kept_token_gives_a_zero_loss_with_a_gradient():
    terms = random_terms(0, [3, 3])
    empty = PolicyTerms(
        terms.logprobs, terms.old_logprobs, terms.advantages, torch.zeros(2, 3, dtype=torch.bool)
    )
    for loss in all_losses(empty, 4).values():
        assert loss.item() == 0
        assert loss.requires_grad


def test_errors_name_the_argument():
    terms = worked_terms()
    with pytest.raises(ValueError, match=r"beta=0\.1 needs kl"):
        grpo_loss(terms, beta=0.1)
    wrong = PolicyTerms(terms.logprobs, torch.zeros(2, 2), terms.advantages, terms.keep_mask)
    with pytest.raises(ValueError, match="old_logprobs must have the shape"):
        grpo_loss(wrong)
    with pytest.raises(ValueError, match="low"):
        ClipRange(-0.1, 0.2)


def test_registry_knows_its_names_and_guards_them():
    assert algorithm("dapo").name == "dapo"
    with pytest.raises(ValueError, match=r"loss_type must be one of .*'dr_grpo'.*got 'ppo2'"):
        algorithm("ppo2")
    with pytest.raises(ValueError, match="already registered"):
        register_algorithm(ALGORITHMS["grpo"])
