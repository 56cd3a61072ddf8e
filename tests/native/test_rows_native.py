"""sample_codes, code_logprobs and gumbel_quantize in C++ against small numpy oracles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from latent_rl import _C
from latent_rl.native.code_logprobs import code_logprobs_backward, code_logprobs_forward
from latent_rl.native.gumbel_quantize import gumbel_quantize_backward, gumbel_quantize_forward
from latent_rl.native.sample_codes import sample_codes
from latent_rl.reference.sample_codes import sample_codes as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def noise(seed: int, offset: int, count: int) -> np.ndarray:
    words = np.array(_C.philox_words(seed, offset, count), dtype=np.float64)
    return -np.log(-np.log((words + 0.5) * 2.0**-32))


def log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def sample_oracle(
    logits: np.ndarray,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    offset: int,
) -> tuple[int, float, float, float]:
    full = log_softmax(logits)
    if temperature == 0:
        code = int(logits.argmax())
        return code, 0.0, float(full[code]), 0.0
    scaled = logits / temperature
    order = sorted(range(len(scaled)), key=lambda k: (-scaled[k], k))
    if top_k:
        order = order[:top_k]
    mass = np.exp(scaled[order] - scaled.max())
    probs, kept, before = mass / mass.sum(), [], 0.0
    for k, p in zip(order, probs, strict=True):
        if kept and before >= top_p:
            break
        kept.append(k)
        before += p
    kept = [k for k in kept if scaled[k] > -np.inf and np.exp(scaled[k] - scaled.max()) >= min_p]
    masked = np.full_like(scaled, -np.inf)
    masked[kept] = scaled[kept]
    code = int((masked + noise(seed, offset, len(scaled))).argmax())
    log_probs = log_softmax(masked)
    p = np.exp(log_probs[kept])
    return code, float(log_probs[code]), float(full[code]), float(-(p * log_probs[kept]).sum())


SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (1.0, 0, 0.7, 0.0),
    (1.4, 0, 1.0, 0.2),
    (0.9, 12, 0.8, 0.05),
    (1.0, 0, 0.0, 0.0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("num_codes", [1, 7, 64, 133])
def test_sample_codes_against_the_oracle(
    isa: str,
    dtype: torch.dtype,
    settings: tuple[float, int, float, float],
    num_codes: int,
) -> None:
    generator = torch.Generator().manual_seed(num_codes)
    logits = (torch.randn(20, num_codes, generator=generator) * 2).to(dtype)
    if num_codes > 2:
        logits[3, 1] = -torch.inf
        logits[4] = 0.5  # ties everywhere
    seeds = torch.randint(-(2**62), 2**62, (20,), generator=generator)
    offsets = torch.randint(0, 2**40, (20,), generator=generator)
    codes, *floats = sample_codes(logits, *settings, seeds, offsets)
    for row in range(20):
        expected = sample_oracle(
            logits[row].double().numpy(), *settings, int(seeds[row]), int(offsets[row])
        )
        assert int(codes[row]) == expected[0]
        # Computed in float64, rounded once to float32.
        got = [float(values[row]) for values in floats]
        np.testing.assert_allclose(got, expected[1:], rtol=1e-6, atol=1e-6)


def test_sample_codes_of_rows_without_a_distribution(isa: str) -> None:
    logits = torch.zeros(5, 40)
    logits[0, 39], logits[1, 0], logits[2] = torch.nan, torch.inf, -torch.inf
    ids = torch.arange(5)
    for temperature in (0.0, 1.0, 0.5):
        codes, logprob, full, entropy = sample_codes(logits, temperature, 3, 0.9, 0.1, ids, ids)
        assert codes.tolist()[:3] == [-1, -1, -1]
        assert (codes[3:] >= 0).all()
        for values in (logprob, full, entropy):
            assert values.isnan().tolist() == [True, True, True, False, False]


def test_the_lowest_id_wins_ties_across_lanes(isa: str) -> None:
    logits = torch.zeros(1, 40)
    logits[0, [8, 1, 33]] = 2.0  # lanes 0, 1 and 1 of vectors of eight
    ids = torch.zeros(1, dtype=torch.int64)
    assert sample_codes(logits, 0.0, 0, 1.0, 0.0, ids, ids)[0].tolist() == [1]
    # Of equal logits top-k keeps the lowest ids, so these are all it can draw.
    seeds = torch.arange(200)
    codes = sample_codes(torch.zeros(200, 40), 1.0, 3, 1.0, 0.0, seeds, seeds)[0]
    assert set(codes.tolist()) == {0, 1, 2}
    logits = torch.zeros(200, 40)
    logits[:, 39] = 1.0  # pushes the highest of the tied ids out
    codes = sample_codes(logits, 1.0, 3, 1.0, 0.0, seeds, seeds)[0]
    assert set(codes.tolist()) == {0, 1, 39}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [(0.8, 32, 0.95, 0.0), (1.3, 64, 0.6, 0.1), (0.2, 50, 1.0, 0)])
def test_short_lists_draw_the_codes_of_the_reference(
    isa: str, dtype: torch.dtype, settings: tuple[float, int, float, float]
) -> None:
    generator = torch.Generator().manual_seed(16)
    logits = (2 * torch.randn(3000, 130, generator=generator)).to(dtype)
    logits[0, 3:] = -torch.inf
    logits[1:40] = logits[1:40].round()  # ties, of which the lower ids come first
    seeds = torch.randint(-(2**62), 2**62, (3000,), generator=generator)
    got = sample_codes(logits, *settings, seeds, seeds)
    expected = reference(logits, *settings, seeds, seeds)
    assert torch.equal(got[0], expected[0])
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=5e-7, atol=5e-7)


def test_draws_that_float32_cannot_tell_are_those_of_float64(isa: str) -> None:
    rows = 200
    seeds = torch.arange(rows)
    zeros = torch.zeros(rows, dtype=torch.int64)
    values = np.stack([noise(row, 0, 24) for row in range(rows)])
    # Every code scores 0 but for the rounding of its logit, 1e-7 or so.
    logits = torch.from_numpy(-values).float()
    settings = (1.0, 23, 1.0, 0.0)
    expected = reference(logits, *settings, seeds, zeros)[0]
    assert len(set(expected.tolist())) > 10
    assert torch.equal(sample_codes(logits, *settings, seeds, zeros)[0], expected)


@pytest.mark.parametrize("above", [-1e-6, -1e-9, 1e-9, 1e-6])
def test_prefixes_that_float32_cannot_tell_are_those_of_float64(isa: str, above: float) -> None:
    # Masses 1 and 1/3: the second code stays when top_p is above 3/4.
    logits = torch.tensor([[np.log(3.0), 0.0, -200.0]] * 100, dtype=torch.float32)
    logits[50:, 1] = torch.tensor(np.log(3.0)).float()  # now of equal mass: 1/2 and 1/2
    seeds = torch.arange(100)
    for edge in (1 / (1 + np.exp(-float(logits[0, 0]))), 0.5):
        settings = (1.0, 2, edge * (1 + above), 0.0)
        got = sample_codes(logits, *settings, seeds, seeds)
        expected = reference(logits, *settings, seeds, seeds)
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[3], expected[3], rtol=1e-6, atol=1e-6)
    # A code as likely as min_p asks, and one a little less.
    for min_p in (np.exp(-float(logits[0, 0])) * (1 + above), 1.0):
        got = sample_codes(logits, 1.0, 2, 1.0, min_p, seeds, seeds)
        expected = reference(logits, 1.0, 2, 1.0, min_p, seeds, seeds)
        torch.testing.assert_close(got[3], expected[3], rtol=1e-6, atol=1e-6)


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40000, 4)
    seeds = torch.arange(40000)
    codes = sample_codes(logits, 1.0, 0, 1.0, 0.0, seeds, torch.zeros_like(seeds))[0]
    share = torch.bincount(codes, minlength=4) / len(codes)
    # Five standard errors of a share: 5 * sqrt(.25 / 40000).
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0, atol=0.0125)


@pytest.mark.parametrize("dtype", DTYPES)
def test_code_logprobs_against_the_oracle(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = (torch.randn(12, 41, generator=generator) * 2).to(dtype)
    ref = (torch.randn(12, 41, generator=generator) * 2).to(dtype)
    logits[2, 5] = ref[2, 5] = -torch.inf
    codes = torch.randint(0, 5, (12,), generator=generator)
    codes[7] = -1
    logprob, entropy, kl = code_logprobs_forward(logits, codes, ref)
    assert logprob[7].isnan()
    for row in [r for r in range(12) if r != 7]:
        log_p = log_softmax(logits[row].double().numpy())
        log_q = log_softmax(ref[row].double().numpy())
        seen = np.isfinite(log_p)
        p = np.exp(log_p[seen])
        expected = [
            log_p[codes[row]],
            -(p * log_p[seen]).sum(),
            (p * (log_p[seen] - log_q[seen])).sum(),
        ]
        got = [float(v[row]) for v in (logprob, entropy, kl)]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def float64_statistics(
    logits: torch.Tensor, codes: torch.Tensor, ref: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability, entropy and KL in float64, the last by terms that do not cancel."""
    log_p, log_q = logits.double().log_softmax(-1), ref.double().log_softmax(-1)
    x, p = log_p - log_q, log_p.exp()
    cost = torch.where(x.abs() < 1e-2, x**2 / 2 - x**3 / 6 + x**4 / 24, x + torch.expm1(-x))
    chosen = log_p.gather(-1, codes[:, None])[:, 0]
    return chosen, -(p * log_p).sum(-1), (p * cost).sum(-1)


@pytest.mark.parametrize("num_codes", [128, 1000, 8192])
@pytest.mark.parametrize("distance", [3.0, 1.0, 0.6, 1e-1, 1e-3, 1e-5])
def test_kls_keep_their_digits_at_any_distance(isa: str, num_codes: int, distance: float) -> None:
    generator = torch.Generator().manual_seed(14)
    logits = 3 * torch.randn(16, num_codes, generator=generator)
    ref = logits + distance * torch.randn(16, num_codes, generator=generator)
    codes = torch.arange(16)
    got = code_logprobs_forward(logits, codes, ref)
    expected = float64_statistics(logits, codes, ref)
    for mine, theirs in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=3e-7, atol=3e-7)
    # Differences of close logits are exact, their mean leaves one rounding of a float32 near 10.
    rtol = 1e-6 + 1e-6 / distance
    torch.testing.assert_close(got[2].double(), expected[2], rtol=rtol, atol=0)
    assert code_logprobs_forward(logits, codes, logits)[2].eq(0).all()


def test_near_certain_rows_keep_their_digits(isa: str) -> None:
    lead = torch.tensor([2.0, 20.0, 40.0, 60.0, 80.0])
    logits = torch.zeros(5, 300)
    logits[:, 7] = lead
    codes = torch.full((5,), 7)
    logprob, entropy, _ = code_logprobs_forward(logits, codes, None)
    # 299 codes of probability exp(-lead) / mass, and what the likeliest lacks to 1. float64's
    # log_softmax has lost these digits.
    others = 299 * (-lead.double()).exp()
    torch.testing.assert_close(logprob.double(), -others.log1p(), rtol=1e-6, atol=0)
    expected = others.log1p() + others * lead / (1 + others)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-6, atol=0)
    ones, zeros = torch.ones(5), torch.zeros(5)
    grad = code_logprobs_backward(ones, zeros, zeros, logits, codes, None)
    torch.testing.assert_close(grad[:, 7].double(), others / (1 + others), rtol=1e-6, atol=0)


@pytest.mark.parametrize("behind", [1.0, 60.0, 200.0])
def test_a_code_the_reference_masks_is_infinitely_far_however_unlikely(
    isa: str, behind: float
) -> None:
    logits, ref = torch.zeros(3, 20), torch.zeros(3, 20)
    logits[0, 11] = -behind
    ref[0, 11] = -torch.inf
    logits[1, 3:] = ref[1, 3:] = -torch.inf
    logits[2, 3:] = -torch.inf
    kl = code_logprobs_forward(logits, torch.zeros(3, dtype=torch.int64), ref)[2]
    assert kl.tolist() == pytest.approx([np.inf, 0.0, np.log(20 / 3)], rel=1e-6)


def test_not_a_number_is_found_whatever_its_bits(isa: str) -> None:
    for bits in (0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF):
        for column in (0, 18):
            logits, ref = torch.zeros(2, 20), torch.zeros(2, 20)
            logits[0].view(torch.int32)[column] = bits
            ref[1].view(torch.int32)[column] = bits
            codes = torch.zeros(2, dtype=torch.int64)
            for values in code_logprobs_forward(logits, codes, ref):
                assert values.isnan().all()
            ones = torch.ones(2)
            assert not code_logprobs_backward(ones, ones, ones, logits, codes, ref).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_code_logprobs_backward_without_a_reference_or_its_weight(
    isa: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(15)
    logits, ref = (2 * torch.randn(2, 9, 37, generator=generator)).to(dtype)
    codes = torch.randint(37, (9,), generator=generator)
    grads = list(torch.randn(3, 9, generator=generator).to(logits.double().dtype))
    grads = [g.to(torch.float64 if dtype == torch.float64 else torch.float32) for g in grads]
    p = logits.double().softmax(-1)
    log_p = logits.double().log_softmax(-1)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    weights = [g.double()[:, None] for g in grads]
    one_hot = torch.nn.functional.one_hot(codes, 37)
    expected = weights[0] * (one_hot - p) - weights[1] * p * (log_p + entropy)
    # One rounding to the dtype, after float32's own.
    rtol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    tolerance = {"rtol": 2 * rtol[dtype], "atol": 2 * rtol[dtype] * 1e-1}
    got = code_logprobs_backward(*grads, logits, codes, None)
    torch.testing.assert_close(got.double(), expected, **tolerance)
    without = code_logprobs_backward(*grads[:2], torch.zeros_like(grads[2]), logits, codes, ref)
    assert torch.equal(without, got)


def finite_differences(
    function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor
) -> torch.Tensor:
    """Central differences of a scalar function of a float64 tensor."""
    grad = torch.zeros_like(at)
    step = 1e-6
    for i in range(at.numel()):
        bump = torch.zeros_like(at)
        bump.view(-1)[i] = step
        grad.view(-1)[i] = (function(at + bump) - function(at - bump)) / (2 * step)
    return grad


def test_code_logprobs_backward_is_the_derivative(isa: str) -> None:
    generator = torch.Generator().manual_seed(9)
    logits, ref = torch.randn(2, 3, 11, generator=generator, dtype=torch.float64)
    codes = torch.tensor([4, 0, 10])
    weights = torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def total(at: torch.Tensor) -> torch.Tensor:
        return (torch.stack(code_logprobs_forward(at, codes, ref)) * weights).sum()

    got = code_logprobs_backward(*weights, logits, codes, ref)
    # Central differences of step 1e-6 in float64 are good to about 1e-9.
    torch.testing.assert_close(got, finite_differences(total, logits), rtol=1e-6, atol=1e-8)


def test_gumbel_quantize_against_the_oracle(isa: str) -> None:
    generator = torch.Generator().manual_seed(10)
    logits = torch.randn(30, 45, generator=generator)
    logits[4, 0] = torch.nan
    codebook = torch.randn(45, 6, generator=generator)
    seeds = torch.arange(30) * 977 - 5
    codes, vectors, entropy, mean_probs, counts = gumbel_quantize_forward(
        logits, codebook, 1.3, seeds, hard=True
    )
    valid = [r for r in range(30) if r != 4]
    probs = []
    for row in valid:
        values = logits[row].double().numpy()
        assert int(codes[row]) == int((values + noise(int(seeds[row]), 0, 45)).argmax())
        probs.append(np.exp(log_softmax(values)))
        expected = -(probs[-1] * np.log(probs[-1])).sum()
        np.testing.assert_allclose(float(entropy[row]), expected, rtol=1e-6)
    assert codes[4] == -1
    assert vectors[4].isnan().all()
    assert torch.equal(vectors[valid], codebook[codes[valid]])
    np.testing.assert_allclose(mean_probs.numpy(), np.mean(probs, 0), rtol=1e-6)
    assert counts.tolist() == torch.bincount(codes[valid], minlength=45).tolist()


def test_gumbel_quantize_backward_is_the_derivative_of_the_soft_form(isa: str) -> None:
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    codebook = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    seeds = torch.tensor([3, -8, 2**50])
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (3,), 9)]

    def total(at: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        _, vectors, entropy, mean_probs, _ = gumbel_quantize_forward(at, table, 0.8, seeds, False)
        return sum(
            (value * weight).sum()
            for value, weight in zip((vectors, entropy, mean_probs), weights, strict=True)
        )

    codes = gumbel_quantize_forward(logits, codebook, 0.8, seeds, False)[0]
    dlogits, dcodebook = gumbel_quantize_backward(
        *weights, logits, codebook, 0.8, seeds, False, codes
    )
    expected = finite_differences(lambda at: total(at, codebook), logits)
    torch.testing.assert_close(dlogits, expected, rtol=1e-6, atol=1e-8)
    expected = finite_differences(lambda at: total(logits, at), codebook)
    torch.testing.assert_close(dcodebook, expected, rtol=1e-6, atol=1e-8)
    # Straight-through: a hard forward leaves the gradient of the logits as it is.
    hard = gumbel_quantize_backward(*weights, logits, codebook, 0.8, seeds, True, codes)
    torch.testing.assert_close(hard[0], dlogits, rtol=0, atol=0)


def all_row_ops(logits: torch.Tensor) -> list[torch.Tensor]:
    rows, num_codes = logits.shape
    seeds = torch.arange(rows)
    codes = torch.arange(rows) % num_codes
    codebook = torch.linspace(-1, 1, num_codes * 5).view(num_codes, 5)
    ones = torch.ones(rows)
    out = list(sample_codes(logits, 0.8, 20, 0.9, 0.01, seeds, seeds))
    out += code_logprobs_forward(logits, codes, logits.flip(0))
    out.append(code_logprobs_backward(ones, ones, ones, logits, codes, logits.flip(0)))
    gumbel = gumbel_quantize_forward(logits, codebook, 1.1, seeds, True)
    return out + list(gumbel)


def test_bits_depend_on_neither_threads_nor_instruction_set(every_isa: list[str]) -> None:
    logits = torch.randn(500, 150, generator=torch.Generator().manual_seed(12)) * 3
    expected: list[torch.Tensor] | None = None
    for name in every_isa:
        _C.select_isa(name)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = all_row_ops(logits)
            expected = expected or got
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_do_not_depend_on_the_batch() -> None:
    logits = torch.randn(60, 33, generator=torch.Generator().manual_seed(13))
    ids = torch.arange(60)
    whole = sample_codes(logits, 0.8, 9, 0.9, 0.0, ids, ids)
    for row in (0, 31, 59):
        one = slice(row, row + 1)
        alone = sample_codes(logits[one], 0.8, 9, 0.9, 0.0, ids[one], ids[one])
        assert all(torch.equal(a[one], b) for a, b in zip(whole, alone, strict=True))
