"""gumbel_quantize's CUDA row on the emulator: the codes of C++, statistics, gradients and edges."""

import pytest
import torch

from latent_rl import ops
from latent_rl.native import gumbel_quantize as native
from latent_rl.native import gumbel_quantize_cuda as cuda
from latent_rl.reference import gumbel_quantize as reference
from latent_rl.reference.philox import gumbel_noise

from .memory import fenced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A few roundings of the output's dtype; for float32 logarithms of the noise, divided by tau.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


PARTS = {"rooms": ("segments",), "modules": ("gumbel_quantize_cuda", "_segments_cuda")}


@pytest.fixture
def module(emulated):
    return emulated("gumbel_quantize", **PARTS)


def logits_and_codes(rows, num_codes, width, dtype=torch.float32):
    return (2 * torch.randn(rows, num_codes)).to(dtype), torch.randn(num_codes, width).to(dtype)


def check_forward(module, in_every_order, logits, codebook, tau=0.7, seed=5, hard=True):
    seeds = ops.row_seeds(seed, len(logits))
    args = fenced(logits), fenced(codebook), tau, fenced(seeds), hard
    got = in_every_order(module, lambda: cuda.gumbel_quantize_forward_cuda(*args))
    codes, vectors, entropy, mean_probs, counts = reference.gumbel_quantize_forward(*args)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[4], counts)
    assert got[1].dtype == logits.dtype
    # The looked up vectors are exact, mixtures are not.
    tolerance = 0 if hard else 4 * TOLERANCE[logits.dtype]
    torch.testing.assert_close(got[1], vectors, rtol=0, atol=tolerance, equal_nan=True)
    # float32 sums of K terms, against a total of at most log K.
    torch.testing.assert_close(got[2], entropy, rtol=2e-6, atol=5e-6, equal_nan=True)
    torch.testing.assert_close(got[3], mean_probs, rtol=1e-5, atol=1e-7)
    return got


def check_backward(module, in_every_order, logits, codebook, tau=0.7, seed=5, hard=True):
    seeds = ops.row_seeds(seed, len(logits))
    codes = reference.gumbel_quantize_forward(logits, codebook, tau, seeds, hard)[0]
    grads = (
        torch.randn(len(logits), codebook.shape[1]).to(logits.dtype),
        torch.randn(len(logits)),
        torch.randn(len(codebook)),
    )
    tensors = [fenced(t) for t in (*grads, logits, codebook, seeds, codes)]
    args = *tensors[:5], tau, tensors[5], hard, tensors[6]
    got = in_every_order(module, lambda: cuda.gumbel_quantize_backward_cuda(*args))
    for mine, theirs in zip(got, reference.gumbel_quantize_backward(*args), strict=True):
        tolerance = TOLERANCE[logits.dtype]
        # The gradient of the one-hot, of order sqrt(D) / tau, is rounded before the differences.
        scale = max(theirs.abs().max().item(), 1.0) if theirs.numel() else 1.0
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=2 * tolerance * scale)
    return got


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_codes", "width"),
    [(3, 1, 1), (37, 13, 7), (9, 128, 16), (9, 130, 8), (4, 512, 9), (3, 515, 8), (2, 2050, 16)],
)
def test_equals_the_reference(module, in_every_order, rows, num_codes, width, dtype, hard) -> None:
    logits, codebook = logits_and_codes(rows, num_codes, width, dtype)
    check_forward(module, in_every_order, logits, codebook, hard=hard)
    check_backward(module, in_every_order, logits, codebook, hard=hard)


def test_the_most_codes(module, in_every_order) -> None:
    check_forward(module, in_every_order, *logits_and_codes(2, 8192, 4))
    with pytest.raises(ValueError, match="at most 8192 codes, got 8193"):
        check_forward(module, in_every_order, *logits_and_codes(1, 8193, 4))


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 30.0])
def test_many_draws_equal_those_of_c_plus_plus(emulated, spread) -> None:
    # Peaked rows (a code without competition), flat ones (all of them), and what lies between.
    logits, codebook = spread * torch.randn(1500, 96), torch.randn(96, 1)
    seeds = ops.row_seeds(1, 1500)
    expected = native.gumbel_quantize_forward(logits, codebook, 1.0, seeds, True)[0]
    emulated("gumbel_quantize", **PARTS)
    got = cuda.gumbel_quantize_forward_cuda(logits, codebook, 1.0, seeds, True)[0]
    assert torch.equal(got, expected)


def near_ties(rows: int, num_codes: int, seeds: torch.Tensor, gap: float) -> torch.Tensor:
    """float32 logits that put every score within about ``gap`` of all others."""
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), num_codes)
    return (gap * torch.randn(rows, num_codes).double() - noise).float()


@pytest.mark.parametrize("num_codes", [40, 600])
@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 1e-3])
def test_scores_that_nearly_tie_are_decided_in_float64(
    module, in_every_order, num_codes, gap
) -> None:
    seeds = ops.row_seeds(5, 30)
    logits = near_ties(30, num_codes, seeds, gap)
    codebook = torch.randn(num_codes, 2)
    got = check_forward(module, in_every_order, logits, codebook)
    assert len(got[0].unique()) > 10


@pytest.mark.parametrize("size", [2.0**30, 2.0**45, 2.0**70, -(2.0**50)])
def test_logits_so_large_that_float64_rounds_the_noise(module, in_every_order, size) -> None:
    logits = torch.full((8, 700), min(2 * size, 0.0))
    logits[:, 150] = logits[:, 70] = logits[:, 601] = size
    got = check_forward(module, in_every_order, logits, torch.randn(700, 2))
    if size == 2.0**70:
        assert got[0].tolist() == [70] * 8  # exact ties


@pytest.mark.parametrize("num_codes", [40, 600])
def test_broken_and_masked_rows(module, in_every_order, num_codes) -> None:
    logits, codebook = logits_and_codes(8, num_codes, 8)
    logits[0, 1], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, : num_codes - 1] = -torch.inf
    logits[4, ::2] = -torch.inf
    logits[5, 3] = -3e38
    for hard in (True, False):
        got = check_forward(module, in_every_order, logits, codebook, hard=hard)
        assert got[0][:4].tolist() == [-1, -1, -1, num_codes - 1]
        assert got[1][:3].isnan().all()
        dlogits, _ = check_backward(module, in_every_order, logits, codebook, hard=hard)
        assert dlogits[:3].eq(0).all()
        assert dlogits.isfinite().all()


@pytest.mark.parametrize("tau", [0.05, 1.0, 2.0])
def test_temperatures(module, in_every_order, tau) -> None:
    logits, codebook = logits_and_codes(12, 33, 5, torch.bfloat16)
    check_forward(module, in_every_order, logits, codebook, tau=tau, hard=False)
    check_backward(module, in_every_order, logits, codebook, tau=tau)


def test_no_rows(module, in_every_order) -> None:
    logits, codebook = logits_and_codes(0, 3, 2)
    got = check_forward(module, in_every_order, logits, codebook)
    assert got[3].tolist() == [0, 0, 0]
    check_backward(module, in_every_order, logits, codebook)


def test_strides_and_alignment_do_not_show(module, in_every_order) -> None:
    logits, codebook = logits_and_codes(9, 44, 8)
    seeds = ops.row_seeds(0, 9)
    expected = cuda.gumbel_quantize_forward_cuda(logits, codebook, 1.0, seeds, True)
    wide = torch.randn(9, 3, 44)
    wide[:, 1] = logits
    shifted = torch.cat([torch.zeros(1), logits.flatten()])[1:].view(9, 44)
    for other in (wide[:, 1], shifted, logits.T.contiguous().T):
        got = cuda.gumbel_quantize_forward_cuda(other, codebook, 1.0, seeds, True)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)


def test_a_row_does_not_depend_on_its_batch(module) -> None:
    logits, codebook = logits_and_codes(90, 40, 8, torch.bfloat16)
    seeds = ops.row_seeds(2, 90)
    whole = cuda.gumbel_quantize_forward_cuda(logits, codebook, 1.0, seeds, True)
    part = cuda.gumbel_quantize_forward_cuda(logits[30:47], codebook, 1.0, seeds[30:47], True)
    for index in (0, 1, 2):
        assert torch.equal(part[index], whole[index][30:47])


def test_the_backward_works_in_chunks(module, in_every_order, monkeypatch) -> None:
    logits, codebook = logits_and_codes(50, 40, 8)
    monkeypatch.setattr(cuda, "_CHUNK_ELEMENTS", 40 * 7)
    check_backward(module, in_every_order, logits, codebook)
    check_backward(module, in_every_order, logits, codebook, hard=False)


def test_the_public_op_and_its_gradients(module) -> None:
    logits, codebook = (t.requires_grad_() for t in logits_and_codes(20, 12, 6))
    out = ops.gumbel_quantize(logits, codebook, tau=2.0, seed=3)
    weight = torch.randn(20, 6)
    loss = (out.vectors * weight).sum() + out.entropy.sum() + out.mean_probs.square().sum()
    ours = torch.autograd.grad(loss, (logits, codebook))
    seeds = ops.row_seeds(3, 20)
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), 12)
    soft = ((logits.double() + noise) / 2.0).softmax(-1)
    hard = torch.nn.functional.one_hot(soft.argmax(-1), 12).double()
    probs = logits.double().softmax(-1)
    loss = (
        (((hard - soft.detach() + soft) @ codebook.double().detach()) * weight).sum()
        + ((hard @ codebook.double()) * weight).sum()
        + torch.special.entr(probs).sum()
        + probs.mean(0).square().sum()
    )
    for mine, theirs in zip(ours, torch.autograd.grad(loss, (logits, codebook)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
