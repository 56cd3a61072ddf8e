"""quantize: parity, gradients, edges, properties, compilation and errors."""

import math

import pytest
import torch

from latent_rl import ops
from latent_rl.reference.quantize import quantize_backward, quantize_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Sums are accumulated in float32 or wider; what differs is their order and the last rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def rows_and_codes(dtype=torch.float32, n=37, num_codes=11, width=19):
    return torch.randn(n, width).to(dtype), torch.randn(num_codes, width).to(dtype)


def composed(x, codebook):
    """The textbook composition, differentiated by autograd."""
    codes = torch.cdist(x, codebook).argmin(1)
    chosen = codebook[codes]
    commitment = (x - chosen.detach()).square().mean()
    codebook_loss = (x.detach() - chosen).square().mean()
    return x + (chosen - x).detach(), commitment, codebook_loss


# parity


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(backend, dtype) -> None:
    x, codebook = rows_and_codes(dtype)
    out = ops.quantize(x, codebook)
    codes, quantized, error, counts, sums, perplexity = quantize_forward(x, codebook, "l2")
    assert torch.equal(out.codes, codes)
    assert torch.equal(out.quantized, quantized)
    assert torch.equal(out.counts, counts)
    for got, expected in (
        (out.commitment_loss, error),
        (out.codebook_loss, error),
        (out.sums, sums),
        (out.perplexity, perplexity),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_statistics_by_hand(backend) -> None:
    x = torch.tensor([[0.0, 1.0], [0.0, 3.0], [10.0, 0.0], [0.0, 2.0]])
    out = ops.quantize(x, torch.tensor([[0.0, 2.0], [9.0, 0.0], [-50.0, 0.0]]))
    assert out.codes.tolist() == [0, 0, 1, 0]
    assert out.counts.tolist() == [3, 1, 0]
    assert out.sums.tolist() == [[0, 6], [10, 0], [0, 0]]
    assert out.commitment_loss.item() == pytest.approx((1 + 1 + 1 + 0) / 8)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert out.perplexity.item() == pytest.approx(math.exp(entropy), rel=1e-6)


# gradients


def test_gradients_equal_those_of_the_composition(backend) -> None:
    grads = []
    for function in (ops.quantize, composed):
        torch.manual_seed(1)
        x, codebook = (t.double().requires_grad_() for t in rows_and_codes())
        weight = torch.randn(x.shape, dtype=torch.float64)
        out = function(x, codebook)
        quantized, commitment, codebook_loss = (
            (out.quantized, out.commitment_loss, out.codebook_loss)
            if isinstance(out, ops.QuantizeOutput)
            else out
        )
        loss = (quantized * weight).sum() + 0.25 * commitment + 3 * codebook_loss
        grads.append(torch.autograd.grad(loss, (x, codebook)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_equals_the_reference(backend, dtype) -> None:
    x, codebook = (t.requires_grad_() for t in rows_and_codes(dtype))
    out = ops.quantize(x, codebook)
    weight = torch.randn(x.shape).to(dtype)
    loss = (out.quantized * weight).sum() + 2 * out.commitment_loss + 3 * out.codebook_loss
    got = torch.autograd.grad(loss, (x, codebook))
    wide = out.sums.dtype
    expected = quantize_backward(
        weight,
        torch.tensor(2.0, dtype=wide),
        torch.tensor(3.0, dtype=wide),
        x.detach(),
        codebook.detach(),
        out.codes,
        out.counts,
        out.sums,
    )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# torch registration


def test_opcheck() -> None:
    x, codebook = (t.requires_grad_() for t in rows_and_codes(n=5, num_codes=3, width=4))
    torch.library.opcheck(torch.ops.latent_rl.quantize_forward.default, (x, codebook, "l2"))


def test_compiled_equals_eager() -> None:
    x, codebook = (t.requires_grad_() for t in rows_and_codes())

    def loss(x, codebook):
        out = ops.quantize(x, codebook)
        return out.quantized.sum() + out.commitment_loss + out.codebook_loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(loss(x, codebook), (x, codebook))
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x, codebook), (x, codebook)), eager, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# edges


def test_broken_rows_count_for_nothing(backend) -> None:
    x, codebook = rows_and_codes()
    clean = ops.quantize(x[1:], codebook)
    x[0, 3] = torch.nan
    x.requires_grad_()
    out = ops.quantize(x, codebook)
    assert out.codes[0] == -1
    assert out.quantized[0].isnan().all()
    assert torch.equal(out.counts, clean.counts)
    torch.testing.assert_close(out.commitment_loss, clean.commitment_loss)
    grad = torch.autograd.grad(out.quantized[1:].sum() + out.commitment_loss, x)[0]
    assert grad[0].eq(0).all()
    assert grad.isfinite().all()


def test_no_rows(backend) -> None:
    out = ops.quantize(torch.empty(0, 3), torch.randn(2, 3))
    assert out.codes.shape == (0,)
    assert out.commitment_loss == 0
    assert out.counts.tolist() == [0, 0]


# properties


def test_quantising_twice_changes_nothing(backend) -> None:
    x, codebook = rows_and_codes()
    once = ops.quantize(x, codebook)
    twice = ops.quantize(once.quantized, codebook)
    assert torch.equal(twice.quantized, once.quantized)
    assert twice.commitment_loss == 0


def test_repeats_bit_for_bit(backend) -> None:
    x, codebook = rows_and_codes(n=3000)
    first, second = ops.quantize(x, codebook), ops.quantize(x, codebook)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# errors


@pytest.mark.parametrize(
    ("x", "codebook", "kind", "message"),
    [
        (
            torch.zeros(4, 3),
            torch.zeros(2, 5),
            ValueError,
            r"must equal x.shape\[-1\] \(3\), got 5",
        ),
        (torch.zeros(4, 3), torch.zeros(0, 3), ValueError, "at least one code"),
        (torch.zeros(4), torch.zeros(2, 3), ValueError, r"x must have shape \[N, D\]"),
        (torch.zeros(4, 3), torch.zeros(2, 3).half(), TypeError, "codebook must have x's dtype"),
    ],
)
def test_bad_input_is_named(x, codebook, kind, message) -> None:
    with pytest.raises(kind, match=f"quantize: .*{message}"):
        ops.quantize(x, codebook)
