"""quantize's CUDA row on the emulator: forward, backward, statistics and edges."""

import pytest
import torch

from latent_rl import ops
from latent_rl.native import quantize_cuda
from latent_rl.reference import quantize as reference

from .memory import fenced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding to the output's dtype, from float32 arithmetic of a few operations.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def module(emulated):
    return emulated("quantize", rooms=("segments",), modules=("quantize_cuda", "_segments_cuda"))


def rows_and_codes(rows, num_codes, width, dtype=torch.float32):
    return torch.randn(rows, width).to(dtype), torch.randn(num_codes, width).to(dtype)


def check_forward(module, in_every_order, x, codebook, metric="l2"):
    inputs = fenced(x), fenced(codebook)
    got = in_every_order(module, lambda: quantize_cuda.quantize_forward_cuda(*inputs, metric))
    codes, quantized, error, counts, sums, perplexity = reference.quantize_forward(
        x, codebook, metric
    )
    assert torch.equal(got[0], codes)
    assert got[1].dtype == x.dtype
    torch.testing.assert_close(got[1], quantized, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[3], counts)
    # float32 sums of at most 64 terms, float64 above that.
    torch.testing.assert_close(got[2], error, rtol=2e-6, atol=0)
    torch.testing.assert_close(got[4], sums, rtol=1e-5, atol=1e-5)
    # A logarithm and an exponential in float32.
    torch.testing.assert_close(got[5], perplexity, rtol=2e-6, atol=0)
    return got


def check_backward(module, in_every_order, x, codebook):
    codes, _, _, counts, sums, _ = reference.quantize_forward(x, codebook, "l2")
    grads = torch.randn(x.shape).to(x.dtype), torch.tensor(2.0), torch.tensor(-3.0)
    args = [fenced(t) for t in (*grads, x, codebook, codes, counts, sums)]
    got = in_every_order(module, lambda: quantize_cuda.quantize_backward_cuda(*args))
    for mine, theirs in zip(got, reference.quantize_backward(*args), strict=True):
        rounding = ROUNDING[x.dtype]
        # n c - s cancels where a code lies near its rows' mean, so the scale is that of its terms.
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=4e-6)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_codes", "width"),
    [(1, 1, 1), (37, 11, 19), (130, 1, 8), (64, 128, 16), (300, 5, 40), (9, 3, 2200)],
)
def test_equals_the_reference(module, in_every_order, rows, num_codes, width, dtype) -> None:
    x, codebook = rows_and_codes(rows, num_codes, width, dtype)
    check_forward(module, in_every_order, x, codebook)
    check_backward(module, in_every_order, x, codebook)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_other_metrics(module, in_every_order, metric) -> None:
    check_forward(module, in_every_order, *rows_and_codes(50, 6, 8), metric)


def test_a_collapsed_codebook(module, in_every_order) -> None:
    x, codebook = rows_and_codes(1500, 4, 8)
    codebook[1:] += 100
    got = check_forward(module, in_every_order, x, codebook)
    assert got[3].tolist() == [1500, 0, 0, 0]
    assert got[5] == 1
    check_backward(module, in_every_order, x, codebook)


def test_broken_rows_duplicates_and_broken_codes(module, in_every_order) -> None:
    x, codebook = rows_and_codes(60, 8, 16)
    x[3, 2], x[17], x[59, 15] = torch.nan, torch.inf, -torch.inf
    codebook[5] = codebook[2]
    codebook[7, 0] = torch.nan
    got = check_forward(module, in_every_order, x, codebook)
    assert (got[0] == -1).nonzero().flatten().tolist() == [3, 17, 59]
    assert got[3][5] == 0
    dx, dcodebook = check_backward(module, in_every_order, x, codebook)
    assert dx[[3, 17, 59]].eq(0).all()
    assert dcodebook[[5, 7]].eq(0).all()


def test_no_rows_and_no_valid_rows(module, in_every_order) -> None:
    x, codebook = rows_and_codes(0, 3, 4)
    got = check_forward(module, in_every_order, x, codebook)
    assert got[2] == 0
    assert got[5] == 1
    check_backward(module, in_every_order, x, codebook)
    broken = torch.full((5, 4), torch.nan)
    check_forward(module, in_every_order, broken, codebook)
    assert check_backward(module, in_every_order, broken, codebook)[0].eq(0).all()


def test_strides_and_alignment_do_not_show(module, in_every_order) -> None:
    x, codebook = rows_and_codes(70, 9, 16)
    expected = quantize_cuda.quantize_forward_cuda(x, codebook, "l2")
    wide = torch.randn(70, 3, 16)
    wide[:, 1] = x
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view(70, 16)
    assert shifted.data_ptr() % 16 != 0
    for other in (wide[:, 1], shifted, x.T.contiguous().T):
        got = quantize_cuda.quantize_forward_cuda(other, codebook, "l2")
        for index in (0, 1, 3, 4, 5):
            assert torch.equal(got[index], expected[index])


def test_a_row_does_not_depend_on_its_batch(module) -> None:
    x, codebook = rows_and_codes(100, 7, 8, torch.bfloat16)
    whole = quantize_cuda.quantize_forward_cuda(x, codebook, "l2")
    part = quantize_cuda.quantize_forward_cuda(x[30:47], codebook, "l2")
    assert torch.equal(part[0], whole[0][30:47])
    assert torch.equal(part[1], whole[1][30:47])


def test_the_public_op_and_its_gradients(module) -> None:
    x, codebook = (t.requires_grad_() for t in rows_and_codes(40, 6, 8))
    weight = torch.randn(40, 8)

    def gradients():
        out = ops.quantize(x, codebook)
        loss = (out.quantized * weight).sum() + out.commitment_loss + 3 * out.codebook_loss
        return torch.autograd.grad(loss, (x, codebook))

    ours = gradients()
    chosen = codebook[ops.nearest_code(x, codebook)]
    loss = (
        ((x + (chosen - x).detach()) * weight).sum()
        + (x - chosen.detach()).square().mean()
        + 3 * (x.detach() - chosen).square().mean()
    )
    for mine, theirs in zip(ours, torch.autograd.grad(loss, (x, codebook)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
