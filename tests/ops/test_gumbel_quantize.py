"""gumbel_quantize: parity, gradients, statistics, edges, compilation and errors."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from latent_rl import ops
from latent_rl.reference.gumbel_quantize import gumbel_quantize_backward, gumbel_quantize_forward
from latent_rl.reference.philox import gumbel_noise

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def logits_and_codes(dtype=torch.float32, n=41, num_codes=13, width=7):
    return torch.randn(n, num_codes).to(dtype), torch.randn(num_codes, width).to(dtype)


# parity


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(backend, dtype, hard) -> None:
    logits, codebook = logits_and_codes(dtype)
    out = ops.gumbel_quantize(logits, codebook, tau=0.7, seed=5, hard=hard)
    seeds = ops.row_seeds(5, len(logits))
    codes, *floats, counts = gumbel_quantize_forward(logits, codebook, 0.7, seeds, hard)
    assert torch.equal(out.codes, codes)
    assert torch.equal(out.counts, counts)
    for got, expected in zip((out.vectors, out.entropy, out.mean_probs), floats, strict=True):
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_equals_the_reference(backend, dtype, hard) -> None:
    logits, codebook = logits_and_codes(dtype)
    grads = (torch.randn(41, 7).to(dtype), *(torch.randn(n).double() for n in (41, 13)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grads = (grads[0], grads[1].to(wide), grads[2].to(wide))
    leaves = logits.requires_grad_(), codebook.requires_grad_()
    out = ops.gumbel_quantize(*leaves, tau=0.7, seed=5, hard=hard)
    got = torch.autograd.grad((out.vectors, out.entropy, out.mean_probs), leaves, grads)
    expected = gumbel_quantize_backward(
        *grads, logits.detach(), codebook.detach(), 0.7, ops.row_seeds(5, 41), hard, out.codes
    )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_codes", [1, 4, 31, 32, 33, 128, 1000])
def test_codes_are_those_of_float64_scores(backend, dtype, num_codes) -> None:
    # Rows of ties, of masks, of wide spreads and far from zero, where float32 alone goes astray.
    flat, wide = torch.zeros(60, num_codes), 30 * torch.randn(60, num_codes)
    far = 1000 + torch.randn(60, num_codes)
    huge = 3e4 * torch.randn(60, num_codes).sign()
    masked = torch.randn(60, num_codes)
    masked[:, 1:][torch.rand(60, num_codes - 1) < 0.7] = -torch.inf
    # Few rivals, far apart: the likely code is often not the winner.
    few = torch.where(torch.arange(num_codes) % 40 == 5, torch.randn(60, num_codes), -20)
    logits = torch.cat((flat, wide, far, huge, masked, few)).to(dtype)
    seeds = ops.row_seeds(17, len(logits))
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), num_codes)
    codes = ops.gumbel_quantize(logits, torch.zeros(num_codes, 1).to(dtype), seed=seeds).codes
    assert torch.equal(codes, (logits.double() + noise).argmax(-1))


@pytest.mark.parametrize("scale", [1e9, 1e20, 3e38])
def test_codes_where_float64_rounds_the_noise(backend, scale) -> None:
    logits = torch.full((50, 40), scale)
    logits[:, ::3] = -scale
    seeds = ops.row_seeds(3, 50)
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), 40)
    out = ops.gumbel_quantize(logits, torch.zeros(40, 1), seed=seeds)
    assert torch.equal(out.codes, (logits.double() + noise).argmax(-1))


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_further_from_float64_than_eager(backend, dtype, hard) -> None:
    logits, codebook = logits_and_codes(dtype, n=200, num_codes=70)
    seeds = ops.row_seeds(5, 200)
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), 70)
    weight = torch.randn(200, 7).to(dtype)

    def outcome(logits, codebook):
        leaves = logits.clone().requires_grad_(), codebook.clone().requires_grad_()
        soft = ((leaves[0] + noise.to(logits.dtype)) / 0.7).softmax(-1)
        one_hot = F.one_hot((logits.double() + noise).argmax(-1), 70).to(logits.dtype)
        vectors = (one_hot - soft.detach() + soft if hard else soft) @ leaves[1]
        probs = leaves[0].softmax(-1)
        entropy = -(probs * probs.log()).sum(-1)
        loss = (vectors * weight.to(logits.dtype)).sum() + entropy.sum()
        return vectors, entropy, *torch.autograd.grad(loss, leaves)

    leaves = logits.clone().requires_grad_(), codebook.clone().requires_grad_()
    out = ops.gumbel_quantize(*leaves, tau=0.7, seed=5, hard=hard)
    loss = (out.vectors * weight).sum() + out.entropy.sum()
    ours = (out.vectors, out.entropy, *torch.autograd.grad(loss, leaves))
    truth, eager = outcome(logits.double(), codebook.double()), outcome(logits, codebook)
    for mine, other, true in zip(ours, eager, truth, strict=True):
        # One rounding to the dtype of the result is always allowed.
        rounding = torch.finfo(mine.dtype).eps * true.abs().max()
        assert (mine - true).abs().max() <= (other - true).abs().max() + rounding


# gradients


def test_gradcheck_of_the_relaxation(backend) -> None:
    logits, codebook = (t.double().requires_grad_() for t in logits_and_codes(n=5, num_codes=4))

    def floats(logits, codebook):
        out = ops.gumbel_quantize(logits, codebook, tau=0.7, seed=5, hard=False)
        return out.vectors, out.entropy, out.mean_probs

    assert torch.autograd.gradcheck(floats, (logits, codebook))


def test_gradcheck_of_the_regularisers(backend) -> None:
    logits, codebook = (t.double().requires_grad_() for t in logits_and_codes(n=5, num_codes=4))

    def floats(logits):
        out = ops.gumbel_quantize(logits, codebook.detach(), tau=0.7, seed=5)
        marginal = torch.special.entr(out.mean_probs).sum()
        return out.entropy, marginal

    assert torch.autograd.gradcheck(floats, (logits,))


@pytest.mark.parametrize("asked", ["vectors", "entropy", "mean_probs"])
def test_each_gradient_alone(backend, asked) -> None:
    # The native backward leaves out the softmax when nothing asks for its gradient.
    leaves = [t.requires_grad_() for t in logits_and_codes()]
    out = ops.gumbel_quantize(*leaves, tau=0.7, seed=5)
    grads = {n: torch.zeros_like(getattr(out, n)) for n in ("vectors", "entropy", "mean_probs")}
    grads[asked] = torch.randn_like(grads[asked])
    got = torch.autograd.grad(getattr(out, asked), leaves[0], grads[asked])[0]
    inputs = (*(t.detach() for t in leaves), 0.7, ops.row_seeds(5, 41), True, out.codes)
    expected = gumbel_quantize_backward(*grads.values(), *inputs)[0]
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_straight_through_equals_its_composition(backend) -> None:
    logits, codebook = (t.double().requires_grad_() for t in logits_and_codes())
    weight = torch.randn(41, 7, dtype=torch.float64)
    out = ops.gumbel_quantize(logits, codebook, tau=2.0, seed=3)
    noise = gumbel_noise(ops.row_seeds(3, 41), torch.zeros(41, dtype=torch.int64), 13)
    soft = ((logits + noise) / 2.0).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 13).double()
    expected = (hard - soft.detach() + soft) @ codebook
    torch.testing.assert_close(out.vectors, expected)
    ours = torch.autograd.grad((out.vectors * weight).sum(), logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weight).sum(), logits)[0])


# statistics


def test_draws_follow_the_softmax(backend) -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    out = ops.gumbel_quantize(probs.log().expand(n, 4).contiguous(), torch.eye(4), seed=11)
    shares = out.counts / n
    # Four standard errors of a share: a false alarm in 16,000 seeds, and the seed is fixed.
    assert ((shares - probs).abs() < 4 * (probs * (1 - probs) / n).sqrt()).all()


def test_a_row_depends_on_its_seed_alone(backend) -> None:
    logits, codebook = logits_and_codes()
    seeds = ops.row_seeds(9, 41)
    whole = ops.gumbel_quantize(logits, codebook, seed=seeds).codes
    alone = [
        ops.gumbel_quantize(logits[i : i + 1], codebook, seed=seeds[i : i + 1]).codes
        for i in range(41)
    ]
    assert torch.equal(torch.cat(alone), whole)
    assert not torch.equal(ops.gumbel_quantize(logits, codebook, seed=10).codes, whole)


# torch registration


def test_opcheck() -> None:
    logits, codebook = (t.requires_grad_() for t in logits_and_codes(n=5))
    torch.library.opcheck(
        torch.ops.latent_rl.gumbel_quantize_forward.default,
        (logits, codebook, 2.0, ops.row_seeds(0, 5), True),
    )


def test_opcheck_of_the_backward() -> None:
    logits, codebook = logits_and_codes(n=5)
    out = ops.gumbel_quantize(logits, codebook, seed=0)
    grads = out.vectors, out.entropy, out.mean_probs
    torch.library.opcheck(
        torch.ops.latent_rl.gumbel_quantize_backward.default,
        (*grads, logits, codebook, 2.0, ops.row_seeds(0, 5), True, out.codes),
    )


@pytest.mark.parametrize("hard", [True, False])
def test_compiled_equals_eager(hard) -> None:
    leaves = [t.requires_grad_() for t in logits_and_codes()]

    def loss(logits, codebook):
        out = ops.gumbel_quantize(logits, codebook, seed=1, hard=hard)
        return out.vectors.sum() + out.entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(loss(*leaves), leaves)
    for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


# properties


@settings(
    max_examples=25,
    deadline=None,
    # A forced backend holds for every example, so one fixture serves them all.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(n=st.integers(2, 40), num_codes=st.integers(1, 70), seed=st.integers(0, 2**62))
def test_splitting_the_batch_adds_up(backend, n, num_codes, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_codes, generator=generator)
    codebook, seeds = torch.randn(num_codes, 3, generator=generator), ops.row_seeds(seed, n)
    out = ops.gumbel_quantize(logits, codebook, seed=seeds)
    halves = slice(0, n // 2), slice(n // 2, n)
    parts = [ops.gumbel_quantize(logits[h], codebook, seed=seeds[h]) for h in halves]
    for name in ("codes", "vectors", "entropy"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(out, name))
    assert torch.equal(parts[0].counts + parts[1].counts, out.counts)


# edges


def test_broken_and_masked_rows(backend) -> None:
    logits, codebook = logits_and_codes(n=5)
    logits[0, 1], logits[1, 2] = torch.nan, torch.inf
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf
    out = ops.gumbel_quantize(logits.requires_grad_(), codebook, seed=2)
    assert out.codes[:4].tolist() == [-1, -1, -1, 0]
    assert out.vectors[:3].isnan().all()
    assert out.entropy[:3].isnan().all()
    assert out.entropy[3] == 0
    grad = torch.autograd.grad(out.vectors[3:].sum() + out.mean_probs.square().sum(), logits)[0]
    assert grad.isfinite().all()
    assert grad[:3].eq(0).all()


@pytest.mark.parametrize("hard", [True, False])
def test_strides_change_nothing(backend, hard) -> None:
    logits, codebook = logits_and_codes()
    wide = torch.randn(41, 26)
    wide[:, ::2] = logits
    dense = ops.gumbel_quantize(logits, codebook, seed=4, hard=hard)
    for strided in (logits.T.contiguous().T, wide[:, ::2], torch.cat((logits, wide), 1)[:, :13]):
        out = ops.gumbel_quantize(strided, codebook.T.contiguous().T, seed=4, hard=hard)
        assert all(torch.equal(a, b) for a, b in zip(out, dense, strict=True))


def test_one_code(backend) -> None:
    out = ops.gumbel_quantize(torch.randn(5, 1), torch.ones(1, 2), seed=4)
    assert out.codes.eq(0).all()
    assert out.entropy.eq(0).all()
    assert out.mean_probs == 1


def test_no_rows(backend) -> None:
    out = ops.gumbel_quantize(torch.empty(0, 3), torch.randn(3, 2), seed=0)
    assert out.vectors.shape == (0, 2)
    assert out.mean_probs.eq(0).all()


# errors


@pytest.mark.parametrize(
    ("logits", "codebook", "options", "kind", "message"),
    [
        (
            torch.zeros(4, 3),
            torch.zeros(2, 5),
            {},
            ValueError,
            r"must equal logits.shape\[-1\] \(3\)",
        ),
        (torch.zeros(4, 3), torch.zeros(3, 5), {"tau": 0.0}, ValueError, "tau must be positive"),
        (torch.zeros(4, 3), torch.zeros(3, 5).half(), {}, TypeError, "codebook must have logits's"),
    ],
)
def test_bad_input_is_named(logits, codebook, options, kind, message) -> None:
    with pytest.raises(kind, match=f"gumbel_quantize: .*{message}"):
        ops.gumbel_quantize(logits, codebook, seed=0, **options)
