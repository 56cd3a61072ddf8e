"""quantize: parity, gradients, edges, properties, compilation and errors."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latent_rl import ops
from latent_rl.reference.quantize import quantize_backward, quantize_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Sums are accumulated in float32 or wider; what differs is their order and the last rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def rows_and_codes(dtype=torch.float32, n=37, num_codes=11, width=19):
    return torch.randn(n, width).to(dtype), torch.randn(num_codes, width).to(dtype)


def composed(x, codebook):
    """The textbook composition, differentiated by autograd."""
    codes = torch.cdist(x.double(), codebook.double()).argmin(1)
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


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_gradcheck_of_the_losses(backend, metric) -> None:
    x, codebook = (t.double().requires_grad_() for t in rows_and_codes(n=6, num_codes=3, width=4))

    # Each loss by the side it moves: its value moves with the other side too, its gradient not.
    def commitment(x):
        return ops.quantize(x, codebook.detach(), metric=metric).commitment_loss

    def codebook_loss(codebook):
        return ops.quantize(x.detach(), codebook, metric=metric).codebook_loss

    assert torch.autograd.gradcheck(commitment, (x,))
    assert torch.autograd.gradcheck(codebook_loss, (codebook,))


def test_gradient_rows_in_one_place(backend) -> None:
    # The gradient of a sum is one number with strides of zero; a column's has rows of one stride.
    x, codebook = (t.requires_grad_() for t in rows_and_codes())
    row = torch.randn(x.shape[1])
    for grad in (torch.ones(()).expand(x.shape), row.expand(x.shape), row[:1].expand(x.shape)):
        got = torch.autograd.grad(ops.quantize(x, codebook).quantized, x, grad)[0]
        assert torch.equal(got, grad)


# torch registration


def test_opcheck() -> None:
    x, codebook = (t.requires_grad_() for t in rows_and_codes(n=5, num_codes=3, width=4))
    torch.library.opcheck(torch.ops.latent_rl.quantize_forward.default, (x, codebook, "l2"))


def test_opcheck_of_the_backward() -> None:
    x, codebook = rows_and_codes(n=5, num_codes=3, width=4)
    codes, quantized, error, counts, sums, _ = quantize_forward(x, codebook, "l2")
    torch.library.opcheck(
        torch.ops.latent_rl.quantize_backward.default,
        (quantized, error, error, x, codebook, codes, counts, sums),
    )


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_nothing(backend, dtype) -> None:
    x, codebook = rows_and_codes(dtype)
    dense = ops.quantize(x, codebook)
    wide = torch.randn(len(x), 2 * x.shape[1]).to(dtype)
    wide[:, ::2] = x
    for strided in (x.T.contiguous().T, wide[:, ::2], torch.cat((x, x), 1)[:, : x.shape[1]]):
        assert not strided.is_contiguous()
        out = ops.quantize(strided, codebook.T.contiguous().T)
        assert all(torch.equal(a, b) for a, b in zip(out, dense, strict=True))


def test_one_code_and_broken_codes(backend) -> None:
    x, codebook = rows_and_codes(num_codes=1)
    out = ops.quantize(x, codebook)
    assert out.codes.eq(0).all()
    assert out.perplexity == 1
    broken = torch.stack((torch.full_like(codebook[0], torch.nan), codebook[0]))
    broken.requires_grad_()
    out = ops.quantize(x, broken)
    assert out.codes.eq(1).all()
    grad = torch.autograd.grad(out.codebook_loss, broken)[0]
    assert grad[0].eq(0).all()
    assert grad[1].isfinite().all()


def test_float16_norms_that_overflow(backend) -> None:
    # |x|^2 is 2048 * 36 = 73,728 and float16 ends at 65,504.
    x, codebook = (6 * t for t in rows_and_codes(torch.float16, width=2048))
    out = ops.quantize(x, codebook)
    assert torch.equal(out.codes, torch.cdist(x.double(), codebook.double()).argmin(1))
    assert out.commitment_loss.isfinite()
    assert out.sums.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_further_from_float64_than_eager(backend, dtype) -> None:
    x, codebook = (t.requires_grad_() for t in rows_and_codes(dtype, n=300, width=70))
    wide = [t.detach().double().requires_grad_() for t in (x, codebook)]
    weight = torch.randn(x.shape).to(dtype)

    def outcome(kind, x, codebook):
        if kind == "ours":
            out = ops.quantize(x, codebook)
            quantized, commitment, loss = out.quantized, out.commitment_loss, out.codebook_loss
        else:
            quantized, commitment, loss = composed(x, codebook)
        total = (quantized * weight.to(x.dtype)).sum() + 100 * commitment + 100 * loss
        return commitment, loss, *torch.autograd.grad(total, (x, codebook))

    truth = outcome("composed", *wide)
    ours = outcome("ours", x, codebook)
    eager = outcome("composed", x, codebook)
    for mine, other, true in zip(ours, eager, truth, strict=True):
        # One rounding to the dtype of the result is always allowed.
        rounding = torch.finfo(mine.dtype).eps * true.abs().max()
        assert (mine - true).abs().max() <= (other - true).abs().max() + rounding


def test_no_rows(backend) -> None:
    out = ops.quantize(torch.empty(0, 3), torch.randn(2, 3))
    assert out.codes.shape == (0,)
    assert out.commitment_loss == 0
    assert out.counts.tolist() == [0, 0]


def test_a_code_with_every_row_and_wide_rows(backend) -> None:
    # More columns than a task of the CPU's grouped pass owns, and a group of every row.
    x, codebook = rows_and_codes(n=50, num_codes=3, width=1100)
    codebook[1:] += 100
    out = ops.quantize(x, codebook)
    assert out.counts.tolist() == [50, 0, 0]
    # Float32 sums of 50 normal numbers of either order differ by a few ulp of their size, 10.
    torch.testing.assert_close(out.sums[0], x.sum(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.commitment_loss, (x - codebook[0]).square().mean())
    assert torch.equal(out.quantized, codebook[:1].expand(50, -1))


# properties


# A forced backend holds for every example, so one fixture serves them all.
whole_numbers = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes = {
    "n": st.integers(1, 30),
    "num_codes": st.integers(1, 9),
    "width": st.integers(1, 20),
    "seed": st.integers(0, 2**31),
}
metrics = st.sampled_from(["l2", "cosine", "dot"])


def whole(seed, *shape):
    """Small whole numbers: sums are exact in any order, and ties and duplicates are common."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@whole_numbers
@given(**sizes)
def test_quantising_twice_changes_nothing(backend, n, num_codes, width, seed) -> None:
    x, codebook = whole(seed, n, width), whole(seed + 1, num_codes, width)
    once = ops.quantize(x, codebook)
    twice = ops.quantize(once.quantized, codebook)
    assert torch.equal(twice.quantized, once.quantized)
    assert twice.commitment_loss == 0
    assert torch.equal(twice.counts, once.counts)


@whole_numbers
@given(**sizes)
def test_permuting_the_codebook_permutes_the_statistics(backend, n, num_codes, width, seed) -> None:
    x, codebook = whole(seed, n, width), torch.unique(whole(seed + 1, num_codes, width), dim=0)
    order = torch.randperm(len(codebook), generator=torch.Generator().manual_seed(seed))
    out, permuted = ops.quantize(x, codebook), ops.quantize(x, codebook[order])
    distance = torch.cdist(x.double(), codebook.double())
    alone = (distance == distance.min(1, keepdim=True).values).sum(1) == 1
    assert torch.equal(order[permuted.codes][alone], out.codes[alone])
    assert permuted.commitment_loss == out.commitment_loss
    if alone.all():
        assert torch.equal(permuted.counts, out.counts[order])
        assert torch.equal(permuted.sums, out.sums[order])


@whole_numbers
@given(**sizes, metric=metrics)
def test_splitting_the_batch_adds_up(backend, n, num_codes, width, metric, seed) -> None:
    x, codebook = whole(seed, n, width), whole(seed + 1, num_codes, width)
    out = ops.quantize(x, codebook, metric=metric)
    parts = [ops.quantize(part, codebook, metric=metric) for part in (x[: n // 2], x[n // 2 :])]
    assert torch.equal(torch.cat([part.codes for part in parts]), out.codes)
    assert torch.equal(torch.cat([part.quantized for part in parts]), out.quantized)
    assert torch.equal(parts[0].counts + parts[1].counts, out.counts)
    assert torch.equal(parts[0].sums + parts[1].sums, out.sums)


@whole_numbers
@given(**sizes, metric=metrics)
def test_the_lowest_of_equal_codes_takes_every_row(
    backend, n, num_codes, width, metric, seed
) -> None:
    x, codebook = whole(seed, n, width), whole(seed + 1, num_codes, width)
    out = ops.quantize(x, torch.cat((codebook, codebook)), metric=metric)
    assert out.codes.max() < num_codes
    assert torch.equal(out.codes, ops.quantize(x, codebook, metric=metric).codes)
    assert out.counts[num_codes:].eq(0).all()


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
