"""sample_codes: the stream, the distribution, truncation, edges, compilation and errors."""

import math

import pytest
import torch

from latent_rl import ops
from latent_rl.reference.philox import philox_words
from latent_rl.reference.sample_codes import sample_codes as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
OPTIONS = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
)


def philox_by_hand(seed: int, offset: int, block: int) -> list[int]:
    """Philox4x32-10 on Python integers, written from the paper."""
    counter = [block, offset & 0xFFFFFFFF, offset >> 32, 0]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


# the stream


def test_philox_equals_the_published_vector() -> None:
    # Random123's known-answer test: all zeros in.
    words = philox_words(torch.tensor([0]), torch.tensor([0]), 4)
    assert words[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_philox_equals_integers_of_any_size() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
    offsets = torch.tensor([0, 2**31, 2**32, 2**40 + 5, 7, 2**62])
    words = philox_words(seeds, offsets, 10)
    for row, (seed, offset) in enumerate(zip(seeds.tolist(), offsets.tolist(), strict=True)):
        expected = [w for block in range(3) for w in philox_by_hand(seed % 2**64, offset, block)]
        assert words[row].tolist() == expected[:10]


# parity


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_codes", [1, 7, 64, 130, 1000])
def test_equals_the_reference(backend, num_codes, dtype, options) -> None:
    logits = (2 * torch.randn(50, num_codes)).to(dtype)
    out = ops.sample_codes(logits, seed=3, offset=4, **options)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    expected = reference(
        logits, *full.values(), ops.row_seeds(3, 50), torch.full((50,), 4, dtype=torch.int64)
    )
    assert torch.equal(out.codes, expected[0])
    for got, wanted in zip(out[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_many_seeds_give_the_same_codes_on_every_backend(monkeypatch) -> None:
    logits = torch.randn(1, 128).expand(20_000, 128)
    drawn = []
    for name in ("reference", "native"):
        monkeypatch.setenv("LATENT_RL_BACKEND", name)
        drawn.append(ops.sample_codes(logits, seed=77, top_k=100).codes)
    assert torch.equal(*drawn)


# the distribution


@pytest.mark.parametrize("options", OPTIONS[2:])
def test_frequencies_follow_the_log_probabilities(backend, options) -> None:
    n, logits = 20_000, torch.randn(12)
    out = ops.sample_codes(logits.expand(n, 12), seed=1, **options)
    counts = torch.bincount(out.codes, minlength=12) / n
    for code in out.codes.unique():
        prob = out.logprob[out.codes == code][0].exp()
        assert (counts[code] - prob).abs() < 4 * (prob * (1 - prob) / n).sqrt() + 1e-6
    kept = out.logprob[torch.stack([(out.codes == c).nonzero()[0, 0] for c in out.codes.unique()])]
    # Rare codes may not have been drawn; what was drawn cannot exceed all.
    assert 0.99 < kept.exp().sum() <= 1 + 1e-5


def test_truncation_equals_that_of_transformers(backend) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4000, 20)
    scores = logits / 0.7
    for warper in (
        warpers.TopKLogitsWarper(8),
        warpers.TopPLogitsWarper(0.8),
        warpers.MinPLogitsWarper(0.1),
    ):
        scores = warper(None, scores)
    out = ops.sample_codes(logits, temperature=0.7, top_k=8, top_p=0.8, min_p=0.1, seed=5)
    log_probs = scores.log_softmax(-1)
    torch.testing.assert_close(out.logprob, log_probs.gather(-1, out.codes[:, None])[:, 0])
    torch.testing.assert_close(out.entropy, torch.special.entr(log_probs.exp()).sum(-1))


def test_full_log_probability_ignores_temperature_and_truncation(backend) -> None:
    logits = torch.randn(30, 9)
    out = ops.sample_codes(logits, temperature=0.3, top_k=2, seed=0)
    expected = logits.log_softmax(-1).gather(-1, out.codes[:, None])[:, 0]
    torch.testing.assert_close(out.logprob_full, expected)


# seeds


def test_a_row_depends_on_its_seed_alone(backend) -> None:
    logits, seeds = torch.randn(16, 33), ops.row_seeds(4, 16)
    whole = ops.sample_codes(logits, seed=seeds, offset=9)
    order = torch.randperm(16)
    shuffled = ops.sample_codes(logits[order], seed=seeds[order], offset=9)
    assert all(torch.equal(a[order], b) for a, b in zip(whole, shuffled, strict=True))
    later = ops.sample_codes(logits, seed=seeds, offset=torch.arange(16))
    assert not torch.equal(later.codes, whole.codes)


def test_row_seeds_are_those_of_splitmix64() -> None:
    # First outputs of the published generator for states 0 and 1.
    assert [s % 2**64 for s in ops.row_seeds(0, 2).tolist()] == [
        0xE220A8397B1DCDAF,
        0x910A2DEC89025CC1,
    ]
    assert torch.equal(ops.row_seeds(torch.tensor(7), 5), ops.row_seeds(7, 5))


# torch registration


def test_opcheck() -> None:
    seeds = ops.row_seeds(0, 4)
    torch.library.opcheck(
        torch.ops.latent_rl.sample_codes.default,
        (torch.randn(4, 6), 1.0, 3, 0.9, 0.0, seeds, seeds),
    )


def test_compiled_equals_eager() -> None:
    logits, seeds = torch.randn(5, 9), ops.row_seeds(0, 5)
    compiled = torch.compile(
        lambda z: ops.sample_codes(z, seed=seeds), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(logits).codes, ops.sample_codes(logits, seed=seeds).codes)


# edges


def test_masked_and_broken_rows(backend) -> None:
    logits = torch.randn(5, 6)
    logits[0, 1], logits[1, 2] = torch.nan, torch.inf
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf
    out = ops.sample_codes(logits, seed=0)
    assert out.codes[:4].tolist() == [-1, -1, -1, 0]
    assert all(value[:3].isnan().all() for value in out[1:])
    assert out.logprob[3] == 0
    assert out.entropy[3] == 0


def test_ties_keep_the_lowest_ids(backend) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).expand(500, 5)
    assert set(ops.sample_codes(logits, seed=0, top_k=2).codes.tolist()) == {1, 2}
    assert ops.sample_codes(logits, seed=0, temperature=0).codes.eq(1).all()


@pytest.mark.parametrize("num_codes", [10, 40, 700])
@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.7, 0.8])
def test_equal_codes_reach_top_p_exactly(backend, num_codes, top_p) -> None:
    # top_p * K is a whole number m, so the first m ids reach top_p and the next is not needed.
    # Sums of 1 / K would round below it for some m.
    out = ops.sample_codes(torch.full((900, num_codes), 1.5), top_p=top_p, seed=0)
    kept = round(top_p * num_codes)
    assert out.codes.max() < kept
    assert out.entropy[0].item() == pytest.approx(math.log(kept), rel=1e-6)


def test_temperatures_that_overflow_define_no_distribution(backend) -> None:
    logits = torch.tensor([[1e300, 0.0], [-1e300, -1e300], [0.0, -1e300]], dtype=torch.float64)
    for options in ({}, {"top_k": 1}, {"top_p": 0.5}):
        out = ops.sample_codes(logits, temperature=1e-200, seed=0, **options)
        assert out.codes.tolist() == [-1, -1, 0]
        assert out.logprob.isnan().tolist() == [True, True, False]


def test_no_rows(backend) -> None:
    assert ops.sample_codes(torch.empty(0, 3), seed=0).codes.shape == (0,)


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must lie in \[0, 1\]"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, r"seed must be a scalar or have shape \[2\]"),
    ],
)
def test_bad_options_are_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.sample_codes(torch.zeros(2, 4), **{"seed": 0, **options})


def test_bad_types_are_named() -> None:
    with pytest.raises(TypeError, match="sample_codes: logits must be float32"):
        ops.sample_codes(torch.zeros(2, 4).long(), seed=0)
    with pytest.raises(TypeError, match="seed must be int64"):
        ops.sample_codes(torch.zeros(2, 4), seed=torch.zeros(2))
