"""Every algorithm against the analytic policy gradient of a bandit: float64 and no sampling.

A bandit's arms are the K codes; a batch that holds each arm once, its advantage times K pi(arm),
is the expectation itself.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latent_rl import ops
from latent_rl.train.estimators import ScoredRollout
from latent_rl.train.losses import (
    ALGORITHMS,
    ClipRange,
    LossSettings,
    Normaliser,
    PolicyTerms,
    SequenceRatio,
    ValueTerms,
)

K = 5
WIDE = ClipRange(1.0, 1e9)
UNBIASED_OFF_POLICY = sorted(set(ALGORITHMS) - {"sapo", "vespo"})


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradient(
    name: str, logits: Tensor, sampled: Tensor, gain: Tensor, reference: Tensor | None = None
) -> Tensor:
    """d loss / d logits with arms drawn from softmax(sampled) in expectation; `gain` [K] is what
    each arm is worth. With a reference, beta = .1 of the exact KL is in the loss."""
    logits = logits.clone().requires_grad_()
    arms = torch.arange(K)[:, None]
    scored = ops.code_logprobs(
        logits.expand(K, 1, K), arms, None if reference is None else reference.expand(K, 1, K)
    )
    old = sampled.log_softmax(-1)[:, None]
    zeros = torch.zeros(K, 1, dtype=torch.float64)
    terms = PolicyTerms(
        logprobs=scored.logprob,
        old_logprobs=old,
        advantages=K * old[:, 0].exp() * gain,
        keep_mask=torch.ones(K, 1, dtype=torch.bool),
        kl=None if reference is None else scored.kl,
        value=ValueTerms(zeros, zeros, zeros),
    )
    beta = 0.0 if reference is None else 0.1
    level = {"ratio": SequenceRatio()} if name in ("gspo", "luspo") else {}
    out = ALGORITHMS[name].loss(
        terms,
        settings=LossSettings(WIDE, beta, **level),
        normaliser=Normaliser(1, torch.tensor(float(K), dtype=torch.float64)),
    )
    out.loss.backward()
    return logits.grad


def analytic(logits: Tensor, gain: Tensor, reference: Tensor | None = None) -> Tensor:
    """d (-(expected gain) + .1 KL) / d logits."""
    logits = logits.clone().requires_grad_()
    objective = -(logits.softmax(-1) * gain).sum()
    if reference is not None:
        log, ref = logits.log_softmax(-1), reference.log_softmax(-1)
        objective = objective + 0.1 * (log.exp() * (log - ref)).sum()
    objective.backward()
    return logits.grad


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_on_policy_gradient_with_any_baseline_is_analytic(name, seed, baseline):
    logits, worth = normal(seed, K), normal(seed + 1, K)
    torch.testing.assert_close(
        gradient(name, logits, logits, worth - baseline), analytic(logits, worth)
    )


@pytest.mark.parametrize("name", UNBIASED_OFF_POLICY)
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000))
def test_unclipped_importance_ratios_correct_for_an_older_policy(name, seed):
    logits, worth = normal(seed, K), normal(seed + 1, K)
    older = logits + 0.5 * normal(seed + 2, K)
    torch.testing.assert_close(gradient(name, logits, older, worth), analytic(logits, worth))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_exact_kl_in_the_loss_and_log_ratio_in_the_reward_agree(name):
    logits, worth, reference = normal(0, K), normal(1, K), normal(2, K)
    expected = analytic(logits, worth, reference)
    in_loss = gradient(name, logits, logits, worth, reference)
    torch.testing.assert_close(in_loss, expected)
    # The log ratio of the taken code as a penalty has the same expected gradient.
    log_ratio = logits.log_softmax(-1) - reference.log_softmax(-1)
    torch.testing.assert_close(gradient(name, logits, logits, worth - 0.1 * log_ratio), expected)
    # The exact KL would not: it is one number for all arms, a baseline that teaches nothing.
    exact = (log_ratio * logits.softmax(-1)).sum()
    same = gradient(name, logits, logits, worth - 0.1 * exact)
    torch.testing.assert_close(same, analytic(logits, worth))


def two_steps(logits: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All K^2 sequences [K^2, 2], their log-probabilities, and those under `sampled` [2, K]."""
    sequences = torch.tensor(list(itertools.product(range(K), repeat=2)))
    taken = logits.log_softmax(-1)[torch.arange(2), sequences]
    return sequences, taken, sampled.log_softmax(-1)[torch.arange(2), sequences]


def test_rloo_corrects_whole_completions():
    logits, older = normal(0, 2, K).requires_grad_(), normal(1, 2, K)
    sequences, taken, old = two_steps(logits, older)
    worth = normal(2, K, K)[sequences[:, 0], sequences[:, 1]]
    count = len(sequences)
    terms = PolicyTerms(
        taken, old, count * old.sum(1).exp() * worth, torch.ones(count, 2, dtype=torch.bool)
    )
    ALGORITHMS["rloo"].loss(
        terms, settings=LossSettings(WIDE), normaliser=Normaliser(2, torch.tensor(1.0))
    ).loss.backward()
    fresh = logits.detach().clone().requires_grad_()
    _, again, _ = two_steps(fresh, older)
    (-(again.sum(1).exp() * worth).sum()).backward()
    torch.testing.assert_close(logits.grad, fresh.grad)


def test_rewards_to_come_less_the_penalty_are_the_gradient_of_the_penalised_return():
    """Two codes, a reward at the end and the penalty on each: what a code is credited with is what
    comes from it on, and the expected gradient is that of E[r] - beta KL(sequence)."""
    logits, reference = normal(0, 2, K).requires_grad_(), normal(1, 2, K)
    sequences, taken, ref = two_steps(logits, reference)
    worth = normal(2, K, K)[sequences[:, 0], sequences[:, 1]]
    probability = taken.detach().sum(1).exp()
    mask = torch.ones(len(sequences), 2, dtype=torch.bool)
    rollout = ScoredRollout(worth, mask[:, 0], mask, 1, 0.1 * (taken.detach() - ref))
    to_come = rollout.token_rewards().flip(1).cumsum(1).flip(1)
    (-(probability[:, None] * to_come * taken).sum()).backward()
    fresh = logits.detach().clone().requires_grad_()
    _, again, _ = two_steps(fresh, reference)
    whole = again.sum(1)
    (-(whole.exp() * (worth - 0.1 * (whole - ref.sum(1)))).sum()).backward()
    torch.testing.assert_close(logits.grad, fresh.grad)
