"""code_logprobs' CUDA row on the emulator: values, gradients, digits kept, edges."""

import pytest
import torch

from latent_rl import ops
from latent_rl.native import code_logprobs_cuda as native
from latent_rl.reference import code_logprobs as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One step of the gradient's dtype, where float32's error tips the rounding; float32's own
# arithmetic is a dozen operations.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture
def module(emulated):
    return emulated("code_logprobs", modules=("code_logprobs_cuda",))


def policy(rows, num_codes, dtype=torch.float32, scale=1.0):
    logits, ref = scale * torch.randn(rows, num_codes), scale * torch.randn(rows, num_codes)
    return logits.to(dtype), torch.randint(num_codes, (rows,)), ref.to(dtype)


def check(module, in_every_order, logits, codes, ref):
    got = in_every_order(module, lambda: native.code_logprobs_forward_cuda(logits, codes, ref))
    for mine, theirs in zip(got, reference.code_logprobs_forward(logits, codes, ref), strict=True):
        # No sum cancels, so a few roundings of float32, also in the small entropies and KLs; the
        # log-probability of a near certain code alone is the difference of logits.
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-7, equal_nan=True)
    grads = torch.randn(3, len(codes)).unbind()
    args = (*grads, logits, codes, ref)
    mine = in_every_order(module, lambda: native.code_logprobs_backward_cuda(*args))
    theirs = reference.code_logprobs_backward(*args)
    assert mine.dtype == logits.dtype
    torch.testing.assert_close(mine, theirs, rtol=ROUNDING[logits.dtype], atol=1e-6)
    return got, mine


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_codes"),
    [(1, 1), (37, 17), (9, 128), (9, 260), (2, 2049), (2, 4096)],
)
def test_equals_the_reference(
    module, in_every_order, rows, num_codes, dtype, with_reference
) -> None:
    logits, codes, ref = policy(rows, num_codes, dtype)
    check(module, in_every_order, logits, codes, ref if with_reference else None)


def test_masks_broken_rows_and_rows_without_a_code(module, in_every_order) -> None:
    logits, codes, ref = policy(40, 40)
    logits[0, 3:9] = ref[0, 3:9] = -torch.inf
    logits[1, 5:] = -torch.inf
    codes[:2] = 2
    codes[2] = -1
    logits[3, 1], logits[4, 7], ref[5, 39], logits[6], ref[7] = (
        torch.nan,
        torch.inf,
        torch.nan,
        -torch.inf,
        -torch.inf,
    )
    got, dlogits = check(module, in_every_order, logits, codes, ref)
    for value in got:
        assert value.isnan().nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7]
    assert dlogits[2:8].eq(0).all()
    assert dlogits[0, 3:9].eq(0).all()


def test_a_code_the_reference_excludes_is_infinitely_far(module) -> None:
    logits, codes, ref = policy(4, 24)
    ref[1, 20] = -torch.inf
    kl = native.code_logprobs_forward_cuda(logits, codes, ref)[2]
    assert kl.isinf().tolist() == [False, True, False, False]
    # A loss that leaves the KL out keeps its gradient.
    grads = (torch.ones(4), torch.ones(4), torch.zeros(4))
    dlogits = native.code_logprobs_backward_cuda(*grads, logits, codes, ref)
    theirs = reference.code_logprobs_backward(*grads, logits, codes, None)
    torch.testing.assert_close(dlogits, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_small_kls_keep_their_digits(module, distance) -> None:
    logits, codes, _ = policy(64, 128, scale=3.0)
    ref = logits + distance * torch.randn(64, 128)
    mine = native.code_logprobs_forward_cuda(logits, codes, ref)[2]
    theirs = reference.code_logprobs_forward(logits, codes, ref)[2]
    assert 0 < theirs.max() < 10 * distance**2
    # Differences of close logits are exact, their mean leaves one rounding of a float32 near 10.
    torch.testing.assert_close(mine, theirs, rtol=2e-6 + 1e-6 / distance, atol=0)
    assert native.code_logprobs_forward_cuda(logits, codes, logits)[2].eq(0).all()


def test_near_certain_rows_keep_their_entropy(module) -> None:
    lead = torch.tensor([20.0, 40.0, 60.0, 80.0])
    logits = torch.zeros(4, 300)
    logits[:, 0] = lead
    mine = native.code_logprobs_forward_cuda(logits, torch.zeros(4, dtype=torch.int64), None)[1]
    # 299 codes of probability exp(-lead), and what the likeliest lacks to 1; terms of the second
    # order are below 299 exp(-20). float64's log_softmax has lost these digits.
    expected = 299 * (-lead.double()).exp() * (1 + lead)
    torch.testing.assert_close(mine.double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("num_codes", [64, 520, 2560])
def test_strides_and_alignment_do_not_show(module, num_codes) -> None:
    logits, codes, ref = policy(6, num_codes)
    grads = torch.randn(3, 6).unbind()
    shifted = torch.cat([torch.zeros(1), logits.flatten()])[1:].view(6, num_codes)
    wide = torch.randn(6, 2, num_codes + 4)
    wide[:, 1, :num_codes] = logits
    for other in (shifted, wide[:, 1, :num_codes], logits.T.contiguous().T):
        for mine, theirs in zip(
            native.code_logprobs_forward_cuda(other, codes, ref),
            native.code_logprobs_forward_cuda(logits, codes, ref),
            strict=True,
        ):
            assert torch.equal(mine, theirs)
        assert torch.equal(
            native.code_logprobs_backward_cuda(*grads, other, codes, ref),
            native.code_logprobs_backward_cuda(*grads, logits, codes, ref),
        )


def test_a_row_does_not_depend_on_its_batch(module) -> None:
    logits, codes, ref = policy(70, 128, torch.bfloat16)
    whole = native.code_logprobs_forward_cuda(logits, codes, ref)
    part = native.code_logprobs_forward_cuda(logits[31:40], codes[31:40], ref[31:40])
    for mine, theirs in zip(part, whole, strict=True):
        assert torch.equal(mine, theirs[31:40])


def test_no_rows_and_the_public_op(module) -> None:
    logits, codes, ref = policy(0, 4)
    assert native.code_logprobs_forward_cuda(logits, codes, ref)[0].shape == (0,)
    logits, codes, ref = policy(12, 20)
    out = ops.code_logprobs(logits.requires_grad_()[None], codes[None], ref[None])
    # The gradient of a sum is one number expanded to every row.
    grad = torch.autograd.grad(out.kl.sum(), logits)[0]
    ones, zeros = torch.ones(12), torch.zeros(12)
    expected = reference.code_logprobs_backward(zeros, zeros, ones, logits.detach(), codes, ref)
    torch.testing.assert_close(grad, expected, rtol=2e-6, atol=1e-6)
