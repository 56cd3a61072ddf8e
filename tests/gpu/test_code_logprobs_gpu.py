"""code_logprobs on a CUDA device: the CPU's results, in graphs, on streams, bit for bit again."""

import pytest
import torch

from latent_rl import backends, ops

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One step of the gradient's dtype, where float32's error tips the rounding.
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = ((1, 1), (1000, 17), (4096, 128), (513, 1000), (64, 8192), (5, 20_001))


def policy(rows, num_codes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + num_codes)
    logits, ref = (torch.randn(rows, num_codes, generator=generator).to(dtype) for _ in range(2))
    return logits, torch.randint(num_codes, (rows,), generator=generator), ref


def scored(logits, codes, ref):
    leaf = logits.clone().requires_grad_()
    out = ops.code_logprobs(leaf, codes, ref)
    loss = (out.logprob + 2 * out.entropy).nansum()
    if ref is not None:
        loss = loss - 3 * out.kl.nansum()
    return out, torch.autograd.grad(loss, leaf)[0]


def test_the_cuda_kernels_serve(cuda) -> None:
    assert backends.serving("code_logprobs", cuda) == "cuda"


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_cpu(cuda, shape, dtype, with_reference) -> None:
    logits, codes, ref = policy(*shape, dtype)
    logits[0, 0] = torch.nan
    codes[-1] = -1
    ref = ref if with_reference else None
    expected, expected_grad = scored(logits, codes, ref)
    got, grad = scored(logits.to(cuda), codes.to(cuda), None if ref is None else ref.to(cuda))
    for mine, theirs in zip(got, expected, strict=True):
        # Sums of up to 20,001 float32 terms in a tree; nothing cancels.
        torch.testing.assert_close(mine.cpu(), theirs, rtol=5e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad.cpu(), expected_grad, rtol=ROUNDING[dtype], atol=2e-6)


def test_masks(cuda) -> None:
    logits, codes, ref = policy(64, 300)
    logits[:, 5:] = -torch.inf
    ref[:, 7:] = -torch.inf
    codes %= 5
    expected, expected_grad = scored(logits, codes, ref)
    got, grad = scored(logits.to(cuda), codes.to(cuda), ref.to(cuda))
    for mine, theirs in zip((*got, grad), (*expected, expected_grad), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=5e-6, atol=1e-6)


def test_small_kls_keep_their_digits(cuda) -> None:
    logits, codes, _ = policy(1000, 128)
    ref = logits + 1e-3 * torch.randn(1000, 128)
    expected = ops.code_logprobs(logits.double(), codes, ref.double()).kl
    got = ops.code_logprobs(logits.to(cuda), codes.to(cuda), ref.to(cuda)).kl
    # Each log-ratio of about 1e-3 carries a rounding of about 1e-7.
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-3, atol=0)


def test_strides_alignment_and_batch_do_not_show(cuda) -> None:
    for num_codes in (64, 520, 4096):
        logits, codes, ref = (t.to(cuda) for t in policy(70, num_codes))
        expected = ops.code_logprobs(logits, codes, ref)
        shifted = torch.cat([torch.zeros(1, device=cuda), logits.flatten()])[1:].view(70, -1)
        for other in (shifted, logits.T.contiguous().T):
            for mine, theirs in zip(ops.code_logprobs(other, codes, ref), expected, strict=True):
                assert torch.equal(mine, theirs)
        part = ops.code_logprobs(logits[31:40], codes[31:40], ref[31:40])
        for mine, theirs in zip(part, expected, strict=True):
            assert torch.equal(mine, theirs[31:40])


def test_bitwise_repeatable(cuda) -> None:
    logits, codes, ref = (t.to(cuda) for t in policy(3000, 1024, torch.bfloat16))
    first, first_grad = scored(logits, codes, ref)
    for _ in range(3):
        again, grad = scored(logits, codes, ref)
        for a, b in zip((*first, first_grad), (*again, grad), strict=True):
            assert torch.equal(a, b)


def test_a_graph_follows_its_inputs(cuda, capture) -> None:
    logits, codes, ref = (t.to(cuda) for t in policy(1000, 128))
    other = torch.randn_like(logits)
    graph, out = capture(lambda: ops.code_logprobs(logits, codes, ref))
    for source in (other, other.flip(0)):
        logits.copy_(source)
        graph.replay()
        for mine, theirs in zip(out, ops.code_logprobs(source, codes, ref), strict=True):
            assert torch.equal(mine, theirs)


def test_runs_on_the_current_stream(cuda) -> None:
    source, codes, ref = (t.to(cuda) for t in policy(4096, 128))
    expected = ops.code_logprobs(source, codes, ref)
    logits = torch.zeros_like(source)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        logits.copy_(source)
        out = ops.code_logprobs(logits, codes, ref)
    side.synchronize()
    assert torch.equal(out.kl, expected.kl)


def test_on_a_device_that_is_not_current(other_cuda) -> None:
    given = policy(300, 33)
    out = ops.code_logprobs(*(t.to(other_cuda) for t in given))
    assert out.kl.device == other_cuda
    expected = ops.code_logprobs(*given).kl
    torch.testing.assert_close(out.kl.cpu(), expected, rtol=5e-6, atol=1e-6)


def test_offsets_past_2_31(cuda) -> None:
    rows, num_codes = 300_000, 8192
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 4 * rows * num_codes * 2:
        pytest.skip("needs 20 GB of device memory")
    logits = torch.zeros(rows, num_codes, dtype=torch.bfloat16, device=cuda)
    logits[-1, 7] = 10
    codes = torch.full((rows,), 7, device=cuda)
    out, grad = scored(logits, codes, None)
    small, small_grad = scored(logits[-2:].clone(), codes[-2:], None)
    assert torch.equal(out.logprob[-2:], small.logprob)
    assert torch.equal(grad[-2:], small_grad)
