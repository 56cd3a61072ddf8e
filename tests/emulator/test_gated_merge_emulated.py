"""gated_merge's CUDA row on the emulator: what lies between torch's products, and their use."""

import pytest
import torch

from latent_rl import ops
from latent_rl.native import gated_merge_cuda as native
from latent_rl.reference import gated_merge as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Roundings of chained products and of what lies between, relative to results of order one.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}
SHAPES = (
    # N, H, D, I, K
    (1, 1, 1, 1, 1),
    (37, 12, 7, 19, 5),
    (50, 16, 8, 64, 3),
    (9, 8, 8, 2056, 4),
    (70, 6, 5, 300, 130),
)


def product_in_float32(codebook, weight):
    """What torch has on CUDA devices alone: a product of low precision that keeps float32."""
    return codebook.float() @ weight.T.float()


@pytest.fixture
def module(emulated, monkeypatch):
    monkeypatch.setattr(native, "_table", product_in_float32)
    return emulated(
        "gated_merge", rooms=("segments",), modules=("gated_merge_cuda", "_segments_cuda")
    )


def inputs(shape, dtype=torch.float32):
    rows, hidden, width, inner, num_codes = shape

    def normal(*sizes):
        return (torch.randn(*sizes) / sizes[-1] ** 0.5).to(dtype)

    joined = hidden + width
    return (
        torch.randn(rows, hidden).to(dtype),
        torch.randint(num_codes, (rows,)),
        torch.randn(num_codes, width).to(dtype),
        normal(inner, joined),
        normal(inner, joined),
        normal(hidden, inner),
    )


def widened(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def close(mine, exact, dtype, scale=1.0):
    assert mine.dtype == dtype
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(mine.double(), exact, rtol=bound, atol=bound * scale, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_reference(module, in_every_order, shape, dtype) -> None:
    given = inputs(shape, dtype)
    got = in_every_order(module, lambda: native.gated_merge_forward_cuda(*given))
    for mine, exact in zip(got, reference.gated_merge_forward(*widened(given)), strict=True):
        close(mine, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_with_tables_equals_the_reference(module, in_every_order, shape, dtype) -> None:
    e, codes, codebook, *weights = inputs(shape, dtype)
    codes[::3] = -1
    tables = ops.merge_tables(codebook, *weights[:2])
    given = (e, codes, tables, *weights)
    got = in_every_order(module, lambda: native.gated_merge_step_cuda(*given))
    close(got, reference.gated_merge_step(*widened(given)), dtype)


@pytest.mark.parametrize("stand_in", ["none", "vectors", "probs"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_equals_the_reference(module, in_every_order, shape, dtype, stand_in) -> None:
    given = inputs(shape, dtype)
    given[1][::3] = -1
    _, pre_gate, pre_up = reference.gated_merge_forward(*given)
    grad = torch.randn(given[0].shape).to(dtype)
    args = (grad, *given, pre_gate, pre_up)
    wanted = (stand_in == "vectors", stand_in == "probs")
    got = in_every_order(module, lambda: native.gated_merge_backward_cuda(*args, *wanted))
    exact = reference.gated_merge_backward(*widened(args), *wanted)
    for mine, theirs in zip(got, exact, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            # Gradients of weights add up N rows.
            close(mine, theirs, dtype, scale=max(1.0, theirs.abs().max().item()))


def test_rows_without_a_code(module, in_every_order) -> None:
    given = inputs((20, 8, 8, 24, 4))
    given[1][[3, 8]] = -1
    given[0][3] = torch.nan
    out, pre_gate, pre_up = in_every_order(module, lambda: native.gated_merge_forward_cuda(*given))
    assert out.isnan().all(1).nonzero().flatten().tolist() == [3, 8]
    grad = torch.randn(20, 8)
    grad[8] = torch.nan
    got = native.gated_merge_backward_cuda(grad, *given, pre_gate, pre_up, True, False)
    assert got[0][[3, 8]].eq(0).all()
    assert got[5][[3, 8]].eq(0).all()
    assert all(t.isfinite().all() for t in got if t is not None)


def test_large_gates_do_not_overflow(module) -> None:
    given = inputs((6, 8, 8, 24, 4))
    given[3].mul_(1000)
    out, pre_gate, pre_up = native.gated_merge_forward_cuda(*given)
    assert pre_gate.abs().max() > 200
    exact = reference.gated_merge_forward(*widened(given))[0]
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-2)
    got = native.gated_merge_backward_cuda(out, *given, pre_gate, pre_up, False, False)
    assert all(t.isfinite().all() for t in got if t is not None)


def test_no_rows(module) -> None:
    given = inputs((0, 8, 8, 24, 4))
    out, pre_gate, pre_up = native.gated_merge_forward_cuda(*given)
    assert out.shape == (0, 8)
    got = native.gated_merge_backward_cuda(out, *given, pre_gate, pre_up, False, False)
    assert got[3].eq(0).all()
    assert got[1].eq(0).all()


def test_weights_may_be_views(module) -> None:
    given = inputs((20, 8, 8, 24, 4))
    expected = native.gated_merge_forward_cuda(*given)
    stacked = torch.cat([given[3], given[4]])
    views = (*given[:3], stacked[:24], stacked[24:], given[5].T.contiguous().T)
    for mine, theirs in zip(native.gated_merge_forward_cuda(*views), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_public_op_and_its_gradients(module) -> None:
    given = inputs((14, 8, 6, 24, 4))
    names = ("e", "codes", "codebook", "w_gate", "w_up", "w_down")
    mine, exact = ([t.clone() for t in tensors] for tensors in (given, widened(given)))
    for tensors in (mine, exact):
        for tensor in tensors:
            tensor.requires_grad_(tensor.is_floating_point())
    weight = torch.randn(14, 8)
    out = ops.gated_merge(**dict(zip(names, mine, strict=True)))
    leaves = [t for t in mine if t.requires_grad]
    got = torch.autograd.grad((out * weight).sum(), leaves)
    joined = torch.cat([exact[0], exact[2][exact[1]]], -1)
    inner = torch.nn.functional.silu(joined @ exact[3].T) * (joined @ exact[4].T)
    dense = ((inner @ exact[5].T) * weight).sum()
    leaves = [t for t in exact if t.requires_grad]
    for a, b in zip(got, torch.autograd.grad(dense, leaves), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
