"""sample_codes' CUDA kernel on the emulator: the codes of C++, whatever the threads' order."""

import pytest
import torch

from latent_rl import ops
from latent_rl.native import sample_codes as native
from latent_rl.reference.sample_codes import sample_codes as reference

OPTIONS = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.5, "top_k": 5},
    {"top_p": 0.6},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
)
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def call(function, logits, seed=0, **options):
    rows = len(logits)
    chosen = {**DEFAULTS, **options}
    return function(logits, *chosen.values(), ops.row_seeds(seed, rows), torch.arange(rows))


@pytest.fixture
def check(emulated, in_every_order):
    module = emulated("sample_codes")

    def checked(logits, **options):
        got = in_every_order(module, lambda: call(native.sample_codes_cuda, logits, **options))
        expected = call(reference, logits, **options)
        assert torch.equal(got[0], expected[0])
        for mine, theirs in zip(got[1:], expected[1:], strict=True):
            assert mine.dtype == theirs.dtype
            # float64 inside on both sides; what is left is the rounding to the output's dtype.
            eps = torch.finfo(mine.dtype).eps
            torch.testing.assert_close(mine, theirs, rtol=2 * eps, atol=4 * eps, equal_nan=True)
        return got

    return checked


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_codes", [1, 7, 130, 512, 1000])
def test_equals_the_reference(check, num_codes, options) -> None:
    check(2 * torch.randn(5, num_codes), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(check, dtype) -> None:
    check((2 * torch.randn(4, 50)).to(dtype), top_k=20, top_p=0.9)


@pytest.mark.parametrize(("num_codes", "top_k"), [(40, 1), (40, 3), (40, 34), (600, 3)])
def test_ties_at_the_boundary_keep_the_lowest_ids(check, num_codes, top_k) -> None:
    logits = torch.zeros(8, num_codes)
    logits[4:, 5:] = -1.0
    codes = check(logits, top_k=top_k)[0]
    assert codes.max() < top_k


def test_rows_without_a_distribution_and_masked_codes(check) -> None:
    logits = torch.randn(6, 40)
    logits[1, 3], logits[2, 0], logits[3], logits[4, 1:] = (
        torch.nan, torch.inf, -torch.inf, -torch.inf
    )  # fmt: skip
    codes = check(logits, top_p=0.7)[0]
    assert (codes == -1).tolist() == [False, True, True, True, False, False]
    assert codes[4] == 0


def test_more_shared_memory_than_the_default(check) -> None:
    check(torch.randn(1, 8192), temperature=0.8)


def test_strided_rows_and_no_rows(check) -> None:
    check(torch.randn(3, 2, 30)[:, 1])
    check(torch.randn(30, 3).T)
    assert check(torch.empty(0, 9))[0].shape == (0,)


def test_codes_equal_the_c_plus_plus_backend_s(emulated, in_every_order) -> None:
    logits = torch.randn(64, 64)
    expected = call(native.sample_codes, logits, top_k=40)[0]
    module = emulated("sample_codes")
    got = in_every_order(module, lambda: call(native.sample_codes_cuda, logits, top_k=40)[0])
    assert torch.equal(got, expected)


def test_the_public_op_runs_on_the_emulated_row(emulated) -> None:
    logits = torch.randn(9, 20)
    expected = ops.sample_codes(logits, top_p=0.9, seed=3)
    emulated("sample_codes")
    got = ops.sample_codes(logits, top_p=0.9, seed=3)
    assert torch.equal(got.codes, expected.codes)
