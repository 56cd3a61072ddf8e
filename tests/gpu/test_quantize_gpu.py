"""quantize on a CUDA device: the CPU's results, in graphs, on streams, bit for bit again."""

import pytest
import torch

from latent_rl import backends, ops

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding to the dtype of the gradient, from float32 arithmetic of a few operations.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = ((300, 1, 8), (1000, 7, 19), (4096, 128, 64), (513, 1000, 256), (50, 5, 2048))


def rows_and_codes(rows, num_codes, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * num_codes + width)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    return x, torch.randn(num_codes, width, generator=generator).to(dtype)


def gradients(x, codebook):
    leaves = x.clone().requires_grad_(), codebook.clone().requires_grad_()
    out = ops.quantize(*leaves)
    weight = torch.linspace(-1, 1, x.shape[1], device=x.device).to(x.dtype)
    loss = (out.quantized * weight).nansum() + 2 * out.commitment_loss - 3 * out.codebook_loss
    return out, torch.autograd.grad(loss, leaves)


def test_the_cuda_kernels_serve(cuda) -> None:
    assert backends.serving("quantize", cuda) == "cuda"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_cpu(cuda, shape, dtype) -> None:
    x, codebook = rows_and_codes(*shape, dtype)
    x[0, 0] = torch.nan
    expected, expected_grads = gradients(x, codebook)
    got, grads = gradients(x.to(cuda), codebook.to(cuda))
    assert torch.equal(got.codes.cpu(), expected.codes)
    assert torch.equal(got.counts.cpu(), expected.counts)
    torch.testing.assert_close(
        got.quantized.cpu(), expected.quantized, rtol=0, atol=0, equal_nan=True
    )
    for name in ("commitment_loss", "codebook_loss", "sums", "perplexity"):
        # float32 sums of at most 64 terms, float64 above that.
        mine, theirs = getattr(got, name).cpu(), getattr(expected, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=ROUNDING[dtype], atol=1e-5)


def test_a_collapsed_codebook(cuda) -> None:
    x, codebook = rows_and_codes(20_000, 4, 64)
    codebook[1:] += 100
    out = ops.quantize(x.to(cuda), codebook.to(cuda))
    assert out.counts.tolist() == [20_000, 0, 0, 0]
    expected = x.double().sum(0)
    # Twenty thousand values of order one, added up 64 in float32 and then in float64.
    torch.testing.assert_close(out.sums[0].cpu().double(), expected, rtol=1e-5, atol=1e-3)


def test_strides_and_alignment_do_not_show(cuda) -> None:
    x, codebook = (t.to(cuda) for t in rows_and_codes(700, 9, 64))
    expected = ops.quantize(x, codebook)
    wide = torch.randn(700, 3, 64, device=cuda)
    wide[:, 1] = x
    shifted = torch.cat([torch.zeros(1, device=cuda), x.flatten()])[1:].view(700, 64)
    for other in (wide[:, 1], shifted, x.T.contiguous().T):
        got = ops.quantize(other, codebook)
        assert torch.equal(got.quantized, expected.quantized)
        assert torch.equal(got.sums, expected.sums)


def test_bitwise_repeatable(cuda) -> None:
    x, codebook = (t.to(cuda) for t in rows_and_codes(30_000, 130, 96, torch.bfloat16))
    first, first_grads = gradients(x, codebook)
    for _ in range(3):
        again, grads = gradients(x, codebook)
        for a, b in zip((*first, *first_grads), (*again, *grads), strict=True):
            assert torch.equal(a, b)


def test_a_graph_follows_its_inputs(cuda, capture) -> None:
    x, codebook = (t.to(cuda) for t in rows_and_codes(1000, 16, 64))
    other = torch.randn_like(x)
    graph, out = capture(lambda: ops.quantize(x, codebook))
    for source in (other, other.flip(0)):
        x.copy_(source)
        graph.replay()
        for mine, theirs in zip(out, ops.quantize(source, codebook), strict=True):
            assert torch.equal(mine, theirs)


def test_runs_on_the_current_stream(cuda) -> None:
    source, codebook = (t.to(cuda) for t in rows_and_codes(4096, 64, 64))
    ops.quantize(source, codebook)
    x = torch.zeros_like(source)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(source)
        out = ops.quantize(x, codebook)
    side.synchronize()
    assert torch.equal(out.sums, ops.quantize(source, codebook).sums)


def test_on_a_device_that_is_not_current(other_cuda) -> None:
    x, codebook = rows_and_codes(300, 9, 64)
    out = ops.quantize(x.to(other_cuda), codebook.to(other_cuda))
    assert out.sums.device == other_cuda
    assert torch.equal(out.codes.cpu(), ops.quantize(x, codebook).codes)


def test_offsets_past_2_31(cuda) -> None:
    rows, width = 5_000_000, 512
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 5 * rows * width * 2:
        pytest.skip("needs 26 GB of device memory")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=cuda)
    x[-1] = 3
    codebook = torch.tensor([0.0, 3.0], device=cuda)[:, None].expand(2, width).bfloat16()
    out = ops.quantize(x, codebook)
    assert out.counts.tolist() == [rows - 1, 1]
    assert out.quantized[-1].eq(3).all()
    assert out.sums.tolist() == [[0.0] * width, [3.0] * width]
