"""sample_tokens' CUDA kernels on the emulator: the tokens of the reference, whatever the order."""

import pytest
import torch

from latent_rl import ops
from latent_rl.native import sample_tokens as native
from latent_rl.reference.sample_tokens import sample_tokens as reference


def arguments(logits, seed=0):
    return logits, ops.row_seeds(seed, len(logits)), torch.arange(len(logits))


@pytest.fixture
def check(emulated, in_every_order):
    module = emulated("sample_tokens")

    def checked(logits, seed=0):
        given = arguments(logits, seed)
        got = in_every_order(module, lambda: native.sample_tokens_cuda(*given))
        assert torch.equal(got, reference(*given))
        return got

    return checked


# A stretch has 2048 tokens up to 16 rows and 8192 beyond.
@pytest.mark.parametrize(("rows", "size"), [(5, 1), (5, 7), (3, 2049), (17, 130), (17, 8200)])
def test_equals_the_reference(check, rows, size) -> None:
    check(3 * torch.randn(rows, size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits(check, dtype) -> None:
    check((3 * torch.randn(4, 2500)).to(dtype))


def test_float32_cannot_order_large_logits(check) -> None:
    # At 2^20 a step of float32 is 1/8: every score is settled in float64, ties by the lowest id.
    check(torch.full((4, 900), 2.0**20))
    check(2.0**20 + torch.randn(4, 900).round())
    # There noise is below float64's own rounding.
    assert check(torch.full((2, 900), 1e30)).tolist() == [0, 0]


def test_two_tokens_a_hair_apart(check) -> None:
    """Logits that make up for the noise leave scores that differ by float32's rounding alone."""
    rows = 3
    seeds, steps = ops.row_seeds(0, rows), torch.arange(rows)
    from latent_rl.reference.philox import gumbel_noise

    logits = (20 - gumbel_noise(seeds, steps, 600)).float()
    check(logits)


def test_likely_tokens_at_both_ends(check) -> None:
    logits = torch.full((2, 5000), -30.0)
    logits[0, 0] = logits[1, -1] = 10.0
    assert check(logits).tolist() == [0, 4999]


def test_rows_without_a_distribution_and_masked_tokens(check) -> None:
    logits = torch.randn(6, 3000)
    logits[1, 2999], logits[2, 0], logits[3], logits[4, :-1] = (
        torch.nan, torch.inf, -torch.inf, -torch.inf
    )  # fmt: skip
    tokens = check(logits)
    assert (tokens == -1).tolist() == [False, True, True, True, False, False]
    assert tokens[4] == 2999


def test_strided_rows_and_no_rows(check) -> None:
    check(torch.randn(3, 2, 31)[:, 1])
    check(torch.randn(30, 3).T)
    assert check(torch.empty(0, 9)).shape == (0,)


def test_float64_is_refused(emulated) -> None:
    emulated("sample_tokens")
    with pytest.raises(ValueError, match="float64 has no CUDA kernel"):
        native.sample_tokens_cuda(*arguments(torch.zeros(2, 3, dtype=torch.float64)))
