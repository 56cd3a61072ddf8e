"""Properties of sample_codes and code_logprobs that hold for any row."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latent_rl import ops

# The fixture only sets an environment variable, which every example shares.
PROPERTY = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Float64 sums over fewer than 100 codes, rounded once to float32.
NEAR = {"rtol": 1e-6, "atol": 1e-6}
MASK = 0xFFFFFFFF


@st.composite
def rows(draw, dtype=torch.float32, masks=True):
    """A batch of logits [B, K] with ties, masks and a wide range of scales."""
    batch, num_codes = draw(st.integers(1, 5)), draw(st.integers(1, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 60.0]))
    logits = scale * torch.randn(batch, num_codes, generator=generator)
    if draw(st.booleans()):
        logits = logits.round()  # many exact ties
    if masks and draw(st.booleans()):
        hidden = torch.rand(batch, num_codes, generator=generator) < 0.4
        hidden[:, draw(st.integers(0, num_codes - 1))] = False
        logits[hidden] = draw(st.sampled_from([-torch.inf, torch.finfo(torch.float32).min]))
    return logits.to(dtype)


truncations = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 2, 7, 33]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.02, 0.6]),
    }
)
seeds = st.integers(-(2**63), 2**63 - 1)


def equal(a, b) -> bool:
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


# the stream and the choice


def philox_word(seed: int, offset: int, code: int) -> int:
    """Word of a code, from the Philox paper, in Python integers of any size."""
    c = [code // 4, offset & MASK, (offset >> 32) & MASK, 0]
    k = [seed & MASK, (seed >> 32) & MASK]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c[code % 4]


def code_by_hand(row: list[float], temperature: float, seed: int, offset: int) -> int:
    def score(code: int) -> float:
        uniform = (philox_word(seed, offset, code) + 0.5) * 2.0**-32
        return row[code] / temperature - math.log(-math.log(uniform))

    return max(range(len(row)), key=lambda code: (score(code), -code))


@PROPERTY
@given(rows(masks=False), seeds, st.integers(0, 2**40 + 9), st.sampled_from([0.3, 1.0, 2.5]))
def test_codes_are_those_of_scalar_arithmetic(backend, logits, seed, offset, temperature) -> None:
    row_seeds = torch.tensor([seed] * len(logits))
    out = ops.sample_codes(logits, temperature=temperature, seed=row_seeds, offset=offset)
    expected = [code_by_hand(row, temperature, seed, offset) for row in logits.double().tolist()]
    assert out.codes.tolist() == expected


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_k": 5}, {"top_p": 0.7}])
@pytest.mark.parametrize("offset", [0, 2**32 - 1, 2**40])
def test_many_seeds_draw_the_codes_of_scalar_arithmetic(backend, offset, options) -> None:
    drawn_from = 40
    logits = torch.randn(drawn_from)
    # Truncation by hand: the likeliest, while the mass before them falls short.
    order = logits.double().sort(descending=True)
    mass = order.values.softmax(-1).cumsum(-1)
    kept = options.get("top_k", drawn_from)
    if "top_p" in options:
        kept = int((mass < options["top_p"]).sum()) + 1
    row = [-math.inf] * drawn_from
    for code in order.indices[:kept].tolist():
        row[code] = float(logits[code])
    chosen = torch.randint(-(2**63), 2**63 - 1, (300,))
    out = ops.sample_codes(logits.expand(300, drawn_from), seed=chosen, offset=offset, **options)
    assert out.codes.tolist() == [code_by_hand(row, 1.0, s, offset) for s in chosen.tolist()]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}])
def test_chi_square_of_the_draws(backend, options) -> None:
    n, num_codes = 20_000, 30
    logits = torch.randn(num_codes)
    out = ops.sample_codes(logits.expand(n, num_codes), seed=11, **options)
    observed = torch.bincount(out.codes, minlength=num_codes).double()
    expected = torch.zeros(num_codes, dtype=torch.float64)
    expected[out.codes] = n * out.logprob.double().exp()
    drawn = expected > 0
    # Codes never drawn belong to one more cell; it is empty when all kept codes were drawn.
    rest = n - expected.sum()
    statistic = ((observed - expected)[drawn].square() / expected[drawn]).sum() + max(rest, 0.0)
    freedom = int(drawn.sum()) - 1
    # Four standard deviations above the mean of a chi-square; the seed is fixed.
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


# sample_codes


@PROPERTY
@given(rows(), truncations, seeds)
def test_splitting_the_batch_changes_nothing(backend, logits, options, seed) -> None:
    own = ops.row_seeds(seed, len(logits))
    whole = ops.sample_codes(logits, seed=own, offset=3, **options)
    parts = [
        ops.sample_codes(logits[i : i + 1], seed=own[i : i + 1], offset=3, **options)
        for i in range(len(logits))
    ]
    assert equal(whole, [torch.cat(values) for values in zip(*parts, strict=True)])


@PROPERTY
@given(rows(), truncations, st.integers(0, 2**32))
def test_backends_draw_the_same_codes(logits, options, seed) -> None:
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        for name in ("reference", "native"):
            patch.setenv("LATENT_RL_BACKEND", name)
            drawn.append(ops.sample_codes(logits, seed=seed, **options))
    assert torch.equal(drawn[0].codes, drawn[1].codes)
    for ours, theirs in zip(drawn[1][1:], drawn[0][1:], strict=True):
        # Masses of the native backend's full softmax are float32, good to 2e-7.
        torch.testing.assert_close(ours, theirs, **NEAR)


@PROPERTY
@given(rows(dtype=torch.float64), truncations, seeds)
def test_permuting_the_codes_permutes_the_distribution(backend, logits, options, seed) -> None:
    # Distinct values: with ties the lowest ids stay, which a permutation changes.
    logits = logits + torch.linspace(0, 1e-3, logits.shape[1], dtype=torch.float64)
    order = torch.randperm(logits.shape[1])
    here = ops.sample_codes(logits, seed=seed, **options)
    there = ops.sample_codes(logits[:, order], seed=seed, **options)
    torch.testing.assert_close(here.entropy, there.entropy, rtol=1e-9, atol=1e-9)


@PROPERTY
@given(rows(), seeds, st.sampled_from([0.3, 1.0, 2.5]))
def test_truncations_that_keep_everything_are_none(backend, logits, seed, temperature) -> None:
    plain = ops.sample_codes(logits, seed=seed, temperature=temperature)
    for keep in ({"top_k": logits.shape[1]}, {"top_k": 10**6}, {"min_p": 1e-300}):
        out = ops.sample_codes(logits, seed=seed, temperature=temperature, **keep)
        assert torch.equal(out.codes, plain.codes)
        for ours, theirs in zip(out[1:], plain[1:], strict=True):
            torch.testing.assert_close(ours, theirs, **NEAR)


@PROPERTY
@given(rows(), seeds)
def test_what_is_sampled_is_what_is_scored(logits, seed) -> None:
    drawn = ops.sample_codes(logits, seed=seed)
    scored = ops.code_logprobs(logits, drawn.codes)
    # Bit for bit, so that the first policy ratio of an update is exactly 1.
    assert torch.equal(drawn.logprob, scored.logprob)
    assert torch.equal(drawn.logprob_full, scored.logprob)
    assert torch.equal(drawn.entropy, scored.entropy)


@PROPERTY
@given(rows(), seeds)
def test_a_dyadic_shift_of_the_logits_changes_nothing(backend, logits, seed) -> None:
    # Small multiples of 1/4 add exactly, so not even rounding may tell the two apart.
    logits = (logits.clamp(-1e3, 1e3) * 4).round() / 4
    here = ops.sample_codes(logits, seed=seed, top_k=9, top_p=0.9)
    there = ops.sample_codes(logits + 64.0, seed=seed, top_k=9, top_p=0.9)
    for a, b in zip(here[1:], there[1:], strict=True):
        same = here.codes == there.codes  # scores near 64 round differently
        assert torch.equal(a[same], b[same])


@PROPERTY
@given(rows(), truncations, seeds)
def test_masked_codes_are_never_drawn_and_change_nothing(backend, logits, options, seed) -> None:
    wide = torch.cat([logits, torch.full((len(logits), 37), -torch.inf)], 1)
    here = ops.sample_codes(logits, seed=seed, **options)
    there = ops.sample_codes(wide, seed=seed, **options)
    assert torch.equal(here.codes, there.codes)
    for a, b in zip(here[1:], there[1:], strict=True):
        torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 50_000}])
def test_seventy_thousand_codes(backend, options) -> None:
    logits = torch.zeros(2, 70_000)
    logits[0, 69_999] = 40.0
    logits[1, :] = -torch.inf
    logits[1, 65_536:65_540] = 1.0
    out = ops.sample_codes(logits, seed=1, **options)
    assert out.codes[0] == 69_999
    assert 65_536 <= out.codes[1] < 65_540
    kept = {3: 3, 50_000: 4, 0: 4}[options.get("top_k", 0)] if "top_p" not in options else 2
    assert out.entropy[1].item() == pytest.approx(math.log(kept), rel=1e-6)


def test_the_largest_float16_logits_and_strides(backend) -> None:
    logits = torch.full((6, 9), 65504.0).half()
    logits[:, 4:] = -65504.0
    out = ops.sample_codes(logits, seed=0, top_k=8, top_p=0.9)
    assert out.codes.lt(4).all()
    torch.testing.assert_close(out.entropy, torch.full((6,), math.log(4)))
    across = ops.sample_codes(logits.T.contiguous().T, seed=0, top_k=8, top_p=0.9)
    every_other = ops.sample_codes(
        logits.repeat_interleave(2, 1)[:, ::2], seed=0, top_k=8, top_p=0.9
    )
    assert equal(out, across)
    assert equal(out, every_other)


# code_logprobs


@PROPERTY
@given(rows(), seeds)
def test_scores_of_codes_split_shift_and_permute(backend, logits, seed) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    # Only what the reference policy allows too, so that KL is finite.
    ref = torch.randn(logits.shape, generator=generator).masked_fill(logits.isinf(), -torch.inf)
    codes = ops.sample_codes(logits, seed=seed).codes
    out = ops.code_logprobs(logits, codes, ref)
    parts = [
        ops.code_logprobs(logits[i : i + 1], codes[i : i + 1], ref[i : i + 1])
        for i in range(len(logits))
    ]
    assert equal(out, [torch.cat(values) for values in zip(*parts, strict=True)])
    order = torch.randperm(logits.shape[1], generator=generator)
    moved = ops.code_logprobs(logits[:, order], order.argsort()[codes], ref[:, order])
    shifted = ops.code_logprobs(logits.double() + 3.0, codes, ref.double() - 8.0)
    for a, b, c in zip(out, moved, shifted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a, c.float(), rtol=1e-6, atol=1e-6)
    assert out.kl.ge(-1e-12).all()
    same = ops.code_logprobs(logits, codes, logits)
    assert same.kl.abs().le(1e-12).all()


def test_a_code_the_reference_masks_makes_kl_infinite(backend) -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    ref = torch.zeros(2, 4)
    ref[0, 2] = -torch.inf
    out = ops.code_logprobs(logits, torch.tensor([0, 1]), ref)
    assert out.kl.tolist() == [math.inf, 0.0]
    # A loss that leaves KL out of that row has an ordinary gradient.
    (out.logprob.sum() + out.kl[1]).backward()
    expected = torch.full((2, 4), -0.25)
    expected[0, 0] = expected[1, 1] = 0.75
    torch.testing.assert_close(logits.grad, expected)
