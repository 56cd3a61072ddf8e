"""What is sampled is what is scored."""

from __future__ import annotations

import pytest
import torch

from latent_rl import ops
from latent_rl.train.sampling import SampledDistribution, mix_seed

DISTRIBUTIONS = [
    SampledDistribution(),
    SampledDistribution(temperature=0.6),
    SampledDistribution(top_k=5),
    SampledDistribution(top_p=0.7),
    SampledDistribution(min_p=0.2),
    SampledDistribution(temperature=1.7, top_k=9, top_p=0.9, min_p=0.05),
]


def logits(rows: int = 400, codes: int = 16) -> torch.Tensor:
    values = 2 * torch.randn(rows, codes, generator=torch.Generator().manual_seed(0))
    # Ties at every boundary: equal logits must be kept lowest id first.
    values[: rows // 4] = values[: rows // 4].round()
    return values


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_scores_equal_the_sampler_s(distribution):
    z = logits()
    drawn = ops.sample_codes(
        z,
        temperature=distribution.temperature,
        top_k=distribution.top_k,
        top_p=distribution.top_p,
        min_p=distribution.min_p,
        seed=3,
    )
    # -1: no code is forced into the support, so this also proves every drawn code was allowed.
    support = distribution.support(z, torch.full_like(drawn.codes, -1))
    scored = ops.code_logprobs(distribution.scaled_logits(z, support), drawn.codes)
    # One softmax in float32 against another: a few ulp of numbers around 1.
    torch.testing.assert_close(scored.logprob, drawn.logprob, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(scored.entropy, drawn.entropy, rtol=1e-5, atol=2e-6)


def test_truncation_really_truncates():
    z = logits()
    for distribution in DISTRIBUTIONS[2:]:
        support = distribution.support(z, torch.full((len(z),), -1))
        assert support.any(-1).all()
        assert (~support).any()
    assert DISTRIBUTIONS[2].support(z, torch.full((len(z),), -1)).sum(-1).eq(5).all()


def test_a_drawn_code_always_belongs_to_the_support():
    z = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    support = SampledDistribution(top_k=2).support(z, torch.tensor([3]))
    assert support.tolist() == [[True, True, False, True]]


def test_support_is_frozen_while_the_policy_moves():
    distribution = SampledDistribution(top_k=1)
    old = torch.tensor([[2.0, 1.0]])
    support = distribution.support(old, torch.tensor([0]))
    new = torch.tensor([[0.0, 5.0]], requires_grad=True)
    scored = ops.code_logprobs(distribution.scaled_logits(new, support), torch.tensor([0]))
    assert scored.logprob.item() == 0  # the only code that could be drawn
    scored.logprob.sum().backward()
    assert new.grad.abs().max() == 0


def test_nothing_to_do_returns_the_same_tensor():
    z = logits()
    distribution = SampledDistribution()
    assert distribution.support(z, torch.zeros(len(z), dtype=torch.int64)) is None
    assert distribution.scaled_logits(z, None) is z


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SampledDistribution(**settings)


def test_mixed_seeds_do_not_collide():
    seeds = {mix_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 2**63 for seed in seeds)
