"""gumbel_quantize on a CUDA device: the CPU's codes and gradients, in graphs, on streams, again."""

import pytest
import torch

from latent_rl import backends, ops
from latent_rl.reference.philox import gumbel_noise

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A few roundings of the output's dtype; for float32 fast logarithms of the noise, divided by tau.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = ((300, 1, 8), (300, 13, 7), (4096, 128, 64), (200, 515, 8), (64, 8192, 32))


def logits_and_codes(rows, num_codes, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * num_codes + width)
    logits = 2 * torch.randn(rows, num_codes, generator=generator)
    return logits.to(dtype), torch.randn(num_codes, width, generator=generator).to(dtype)


def gradients(logits, codebook, hard=True):
    leaves = logits.clone().requires_grad_(), codebook.clone().requires_grad_()
    out = ops.gumbel_quantize(*leaves, tau=0.7, seed=5, hard=hard)
    width = codebook.shape[1]
    weight = torch.linspace(-1, 1, width, device=logits.device).to(logits.dtype)
    loss = (out.vectors * weight).nansum() + out.entropy.nansum() + out.mean_probs.square().sum()
    return out, torch.autograd.grad(loss, leaves)


def test_the_cuda_kernels_serve(cuda) -> None:
    assert backends.serving("gumbel_quantize", cuda) == "cuda"


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_cpu(cuda, shape, dtype, hard) -> None:
    logits, codebook = logits_and_codes(*shape, dtype)
    logits[0, 0] = torch.nan
    expected, expected_grads = gradients(logits, codebook, hard)
    got, grads = gradients(logits.to(cuda), codebook.to(cuda), hard)
    assert torch.equal(got.codes.cpu(), expected.codes)
    assert torch.equal(got.counts.cpu(), expected.counts)
    tolerance = 0 if hard else 8 * TOLERANCE[dtype]
    torch.testing.assert_close(
        got.vectors.cpu(), expected.vectors, rtol=0, atol=tolerance, equal_nan=True
    )
    torch.testing.assert_close(
        got.entropy.cpu(), expected.entropy, rtol=1e-5, atol=2e-5, equal_nan=True
    )
    torch.testing.assert_close(got.mean_probs.cpu(), expected.mean_probs, rtol=2e-5, atol=1e-7)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        scale = max(theirs.abs().max().item(), 1.0)
        torch.testing.assert_close(
            mine.cpu(), theirs, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype] * scale
        )


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("num_codes", [96, 2000])
def test_many_draws_equal_the_cpu_s(cuda, num_codes, spread) -> None:
    generator = torch.Generator().manual_seed(num_codes)
    logits = spread * torch.randn(20_000, num_codes, generator=generator)
    codebook = torch.zeros(num_codes, 8)
    expected = ops.gumbel_quantize(logits, codebook, seed=1).codes
    assert torch.equal(
        ops.gumbel_quantize(logits.to(cuda), codebook.to(cuda), seed=1).codes.cpu(), expected
    )


@pytest.mark.parametrize("num_codes", [40, 600])
@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 1e-3])
def test_scores_that_nearly_tie_are_decided_in_float64(cuda, num_codes, gap) -> None:
    seeds = ops.row_seeds(5, 2000)
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), num_codes)
    logits = (gap * torch.randn(2000, num_codes).double() - noise).float()
    codebook = torch.zeros(num_codes, 8)
    expected = ops.gumbel_quantize(logits, codebook, seed=5).codes
    assert torch.equal(
        ops.gumbel_quantize(logits.to(cuda), codebook.to(cuda), seed=5).codes.cpu(), expected
    )


def test_rows_without_a_distribution(cuda) -> None:
    logits, codebook = (t.to(cuda) for t in logits_and_codes(4, 10, 8))
    logits[1, 3], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    out, (dlogits, dcodebook) = gradients(logits, codebook)
    assert (out.codes == -1).tolist() == [False, True, True, True]
    assert out.vectors[1:].isnan().all()
    assert dlogits[1:].eq(0).all()
    assert dcodebook.isfinite().all()


def test_bitwise_repeatable_and_independent_of_the_batch(cuda) -> None:
    logits, codebook = (t.to(cuda) for t in logits_and_codes(3000, 700, 64, torch.bfloat16))
    first, first_grads = gradients(logits, codebook)
    for _ in range(3):
        again, grads = gradients(logits, codebook)
        for a, b in zip((*first, *first_grads), (*again, *grads), strict=True):
            assert torch.equal(a, b)
    seeds = ops.row_seeds(5, 3000, cuda)
    part = ops.gumbel_quantize(logits[300:317], codebook, seed=seeds[300:317])
    assert torch.equal(part.codes, first.codes[300:317])
    assert torch.equal(part.entropy, first.entropy[300:317])


def test_a_replayed_graph_can_be_reseeded(cuda, capture) -> None:
    logits, codebook = (t.to(cuda) for t in logits_and_codes(500, 128, 64))
    seeds = ops.row_seeds(0, 500, cuda)
    graph, out = capture(lambda: ops.gumbel_quantize(logits, codebook, seed=seeds))
    for seed in (0, 9):
        seeds.copy_(ops.row_seeds(seed, 500, cuda))
        graph.replay()
        expected = ops.gumbel_quantize(logits, codebook, seed=seed)
        for mine, theirs in zip(out, expected, strict=True):
            assert torch.equal(mine, theirs)


def test_the_backward_can_be_captured(cuda, capture) -> None:
    logits, codebook = (t.to(cuda) for t in logits_and_codes(500, 128, 64))
    seeds = ops.row_seeds(5, 500, cuda)
    codes = ops.gumbel_quantize(logits, codebook, tau=0.7, seed=seeds).codes
    grads = torch.randn(500, 64, device=cuda), torch.randn(500, device=cuda)
    args = *grads, torch.randn(128, device=cuda), logits, codebook, 0.7, seeds, True, codes
    graph, out = capture(lambda: torch.ops.latent_rl.gumbel_quantize_backward(*args))
    grads[0].mul_(2)
    graph.replay()
    expected = torch.ops.latent_rl.gumbel_quantize_backward(*args)
    for mine, theirs in zip(out, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_runs_on_the_current_stream(cuda) -> None:
    source, codebook = (t.to(cuda) for t in logits_and_codes(4096, 128, 64))
    logits = torch.zeros_like(source)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        logits.copy_(source)
        out = ops.gumbel_quantize(logits, codebook, seed=0)
    side.synchronize()
    assert torch.equal(out.vectors, ops.gumbel_quantize(source, codebook, seed=0).vectors)


def test_on_a_device_that_is_not_current(other_cuda) -> None:
    logits, codebook = logits_and_codes(64, 128, 8)
    out = ops.gumbel_quantize(logits.to(other_cuda), codebook.to(other_cuda), seed=0)
    assert out.codes.device == other_cuda
    assert torch.equal(out.codes.cpu(), ops.gumbel_quantize(logits, codebook, seed=0).codes)


def test_offsets_past_2_31(cuda) -> None:
    rows, num_codes = 300_000, 8192
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 3 * rows * num_codes:
        pytest.skip("needs 8 GB of device memory")
    logits = torch.zeros(rows, num_codes, dtype=torch.bfloat16, device=cuda)
    logits[-1] = logits_and_codes(1, num_codes, 8, torch.bfloat16)[0][0].to(cuda)
    codebook = torch.zeros(num_codes, 8, dtype=torch.bfloat16, device=cuda)
    seeds = ops.row_seeds(0, rows, cuda)
    whole = ops.gumbel_quantize(logits, codebook, seed=seeds)
    last = ops.gumbel_quantize(logits[-1:], codebook, seed=seeds[-1:])
    assert whole.codes[-1] == last.codes[0]
    assert whole.entropy[-1] == last.entropy[0]
