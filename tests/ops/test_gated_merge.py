"""gated_merge: parity, gradients, stand-ins, edges, compilation and errors."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from latent_rl import ops
from latent_rl.reference.gated_merge import gated_merge_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Errors of two chained products, relative to outputs of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}
N, HIDDEN, WIDTH, INNER, CODES = 23, 12, 7, 17, 5


def inputs(dtype=torch.float32):
    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) / shape[-1] ** 0.5).to(dtype)

    return {
        "e": torch.randn(N, HIDDEN).to(dtype),
        "codes": torch.randint(CODES, (N,)),
        "codebook": torch.randn(CODES, WIDTH).to(dtype),
        "w_gate": normal(INNER, HIDDEN + WIDTH),
        "w_up": normal(INNER, HIDDEN + WIDTH),
        "w_down": normal(HIDDEN, INNER),
    }


def dense(e, vectors, w_gate, w_up, w_down):
    """The block as the paper writes it, on joined vectors."""
    joined = torch.cat([e, vectors], -1)
    return F.linear(F.silu(F.linear(joined, w_gate)) * F.linear(joined, w_up), w_down)


def leaves(tensors):
    return [t.requires_grad_() for name, t in tensors.items() if name != "codes"]


# parity


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_that_of_the_same_dtype_composition(backend, dtype) -> None:
    arguments = inputs(dtype)
    exact = gated_merge_forward(
        *(t if t.dtype == torch.int64 else t.double() for t in arguments.values())
    )[0]
    got = ops.gated_merge(**arguments).double()
    torch.testing.assert_close(got, exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_with_tables_equals_the_block(backend, dtype) -> None:
    arguments = inputs(dtype)
    arguments["codes"][3] = -1
    codebook = arguments.pop("codebook")
    tables = ops.merge_tables(codebook, arguments["w_gate"], arguments["w_up"])
    assert tables.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = gated_merge_forward(
        *(t if t.dtype == torch.int64 else t.double() for t in inputs_in_order(arguments, codebook))
    )[0]
    got = ops.gated_merge_step(**arguments, tables=tables)
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert got[3].isnan().all()


def inputs_in_order(arguments, codebook):
    return [arguments["e"], arguments["codes"], codebook, *list(arguments.values())[2:]]


def test_autocast_around_an_op_does_not_reach_into_it(backend) -> None:
    arguments = inputs()
    step = {name: t for name, t in arguments.items() if name != "codebook"}
    outside = ops.gated_merge(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        tables = ops.merge_tables(*(arguments[n] for n in ("codebook", "w_gate", "w_up")))
        inside = ops.gated_merge(**arguments), ops.gated_merge_step(**step, tables=tables)
    assert tables.dtype == torch.float32
    assert torch.equal(inside[0], outside)
    torch.testing.assert_close(inside[1], outside, rtol=1e-5, atol=1e-5)


# gradients


def test_gradcheck(backend) -> None:
    arguments = inputs(torch.float64)
    codes = arguments["codes"]

    def block(e, codebook, w_gate, w_up, w_down):
        return ops.gated_merge(e, codes, codebook, w_gate, w_up, w_down)

    assert torch.autograd.gradcheck(block, leaves(arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_those_of_the_dense_form(backend, dtype) -> None:
    arguments = inputs(dtype)
    ours = (
        torch.autograd.grad(ops.gated_merge(**arguments).double().square().sum(), leaves(arguments))
        if (leaves(arguments))
        else ()
    )
    wide = {k: t if t.dtype == torch.int64 else t.detach().double() for k, t in arguments.items()}
    targets = leaves(wide)
    out = dense(wide["e"], wide["codebook"][wide["codes"]], *list(wide.values())[3:])
    theirs = torch.autograd.grad(out.square().sum(), targets)
    for got, expected in zip(ours, theirs, strict=True):
        scale = expected.abs().max()
        assert (got.double() - expected).abs().max() <= TOLERANCE[dtype] * (1 + 4 * scale)


@pytest.mark.parametrize(
    ("rows", "num_codes", "in_use"),
    # Every code of many rows; few of many codes; hardly fewer codes than rows.
    [(40, 2, 2), (40, 50, 3), (40, 50, 39)],
)
def test_codes_out_of_use_change_nothing(backend, rows, num_codes, in_use) -> None:
    arguments = inputs(torch.float64)
    arguments["e"] = torch.randn(rows, HIDDEN, dtype=torch.float64)
    arguments["codebook"] = torch.randn(num_codes, WIDTH, dtype=torch.float64)
    arguments["codes"] = torch.randperm(num_codes)[torch.arange(rows) % in_use]
    arguments["codes"][5] = -1
    wanted = leaves(arguments)
    out = ops.gated_merge(**arguments)
    got = torch.autograd.grad(out.nan_to_num().square().sum(), wanted)
    e, codebook, *weights = wanted
    expected = dense(e, codebook[arguments["codes"].clamp(min=0)], *weights)
    assert out[5].isnan().all()
    valid = arguments["codes"] >= 0
    torch.testing.assert_close(out[valid], expected[valid])
    theirs = torch.autograd.grad(expected[valid].square().sum(), wanted)
    for ours, reference in zip(got, theirs, strict=True):
        torch.testing.assert_close(ours, reference)
    with torch.no_grad():
        assert torch.equal(ops.gated_merge(**arguments).nan_to_num(), out.nan_to_num())


def test_no_row_has_a_code(backend) -> None:
    arguments = inputs(torch.float64)
    arguments["codes"].fill_(-1)
    wanted = leaves(arguments)
    out = ops.gated_merge(**arguments)
    assert out.isnan().all()
    for grad in torch.autograd.grad(out.nan_to_num().sum(), wanted):
        assert grad.eq(0).all()


def test_code_vectors_receive_the_gradient_of_the_code(backend) -> None:
    arguments = inputs(torch.float64)
    vectors = arguments["codebook"][arguments["codes"]].clone().requires_grad_()
    codebook = arguments["codebook"].requires_grad_()
    out = ops.gated_merge(**arguments, code_vectors=vectors)
    got, at_codebook = torch.autograd.grad(out.square().sum(), (vectors, codebook))
    weights = arguments["w_gate"], arguments["w_up"], arguments["w_down"]
    expected = torch.autograd.grad(
        dense(arguments["e"], vectors, *weights).square().sum(), vectors
    )[0]
    torch.testing.assert_close(got, expected)
    assert at_codebook.eq(0).all()


def test_code_probs_receive_the_gradient_of_the_one_hot(backend) -> None:
    arguments = inputs(torch.float64)
    probs = F.one_hot(arguments["codes"], CODES).double().requires_grad_()
    codebook = arguments["codebook"].requires_grad_()
    out = ops.gated_merge(**arguments, code_probs=probs)
    ours = torch.autograd.grad(out.square().sum(), (probs, codebook))
    weights = arguments["w_gate"], arguments["w_up"], arguments["w_down"]
    composed = dense(arguments["e"], probs @ codebook, *weights).square().sum()
    for got, expected in zip(ours, torch.autograd.grad(composed, (probs, codebook)), strict=True):
        torch.testing.assert_close(got, expected)


# properties


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_renaming_the_codes_renames_their_gradient(backend, rows, num_codes, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    arguments = inputs(torch.float64)
    arguments["e"] = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)
    arguments["codes"] = torch.randint(-1, num_codes, (rows,), generator=generator)
    arguments["codebook"] = torch.randn(num_codes, WIDTH, generator=generator, dtype=torch.float64)
    name = torch.randperm(num_codes, generator=generator)
    renamed = dict(arguments, codebook=arguments["codebook"][name.argsort()].clone())
    # Index -1 reads the appended entry, so a masked row stays masked.
    renamed["codes"] = torch.cat([name, torch.tensor([-1])])[arguments["codes"]]
    outputs, grads = [], []
    for tensors in (arguments, renamed):
        wanted = leaves(tensors)
        outputs.append(ops.gated_merge(**tensors))
        grads.append(torch.autograd.grad(outputs[-1].nan_to_num().square().sum(), wanted))
    torch.testing.assert_close(*outputs, equal_nan=True)
    torch.testing.assert_close(grads[0][1], grads[1][1][name])
    torch.testing.assert_close(grads[0][0], grads[1][0])


def test_gradients_repeat_bit_for_bit(backend) -> None:
    arguments = inputs()
    wanted = leaves(arguments)
    first, second = (
        torch.autograd.grad(ops.gated_merge(**arguments).square().sum(), wanted) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [50.0, 200.0, 1e4])
def test_gates_far_from_zero(backend, size) -> None:
    # silu(-size) is 0 and silu(size) is size to float32's precision.
    e = torch.tensor([[size], [-size]])
    one, codebook = torch.ones(1, 2), torch.zeros(1, 1)
    out = ops.gated_merge(
        e, torch.zeros(2, dtype=torch.int64), codebook, one, one, torch.ones(1, 1)
    )
    torch.testing.assert_close(out, torch.tensor([[size * size], [0.0]]))


# torch registration


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.latent_rl.gated_merge_forward.default, tuple(inputs().values()))


def test_opcheck_of_the_step() -> None:
    arguments = inputs()
    codebook = arguments.pop("codebook")
    tables = ops.merge_tables(codebook, arguments["w_gate"], arguments["w_up"])
    e, codes, *weights = arguments.values()
    torch.library.opcheck(
        torch.ops.latent_rl.gated_merge_step.default, (e, codes, tables, *weights)
    )


def test_compiled_equals_eager() -> None:
    arguments = inputs()
    wanted = leaves(arguments)
    compiled = torch.compile(ops.gated_merge, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(ops.gated_merge(**arguments).square().sum(), wanted)
    got = torch.autograd.grad(compiled(**arguments).square().sum(), wanted)
    for ours, theirs in zip(got, eager, strict=True):
        torch.testing.assert_close(ours, theirs)


# edges


def test_leading_dimensions_are_free(backend) -> None:
    arguments = inputs()
    flat = ops.gated_merge(**arguments)
    arguments["e"], arguments["codes"] = (
        arguments["e"].reshape(1, N, HIDDEN),
        arguments["codes"].reshape(1, N),
    )
    assert torch.equal(ops.gated_merge(**arguments)[0], flat)


def test_masked_rows_give_nan_and_no_gradient(backend) -> None:
    arguments = inputs(torch.float64)
    arguments["codes"][3] = -1
    out = ops.gated_merge(**arguments)
    assert out[3].isnan().all()
    wanted = leaves(arguments)
    grads = torch.autograd.grad(ops.gated_merge(**arguments).nan_to_num().sum(), wanted)
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][3].eq(0).all()


def test_no_rows(backend) -> None:
    arguments = inputs()
    arguments["e"], arguments["codes"] = arguments["e"][:0], arguments["codes"][:0]
    assert ops.gated_merge(**arguments).shape == (0, HIDDEN)


# errors


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"w_up": torch.zeros(INNER, 3)}, ValueError, "w_up must have shape"),
        ({"codes": torch.full((N,), CODES)}, ValueError, r"codes must lie in \[-1, 5\)"),
        ({"codes": torch.zeros(N)}, TypeError, "codes must be int64"),
        ({"codes": torch.zeros(N - 1, dtype=torch.int64)}, ValueError, "codes must have shape"),
        ({"w_down": torch.zeros(HIDDEN, INNER).half()}, TypeError, "w_down must have e's dtype"),
        ({"code_vectors": torch.zeros(N, 3)}, ValueError, "code_vectors must have shape"),
    ],
)
def test_bad_input_is_named(change, kind, message) -> None:
    with pytest.raises(kind, match=f"gated_merge: .*{message}"):
        ops.gated_merge(**{**inputs(), **change})


def test_both_stand_ins_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        ops.gated_merge(
            **inputs(), code_vectors=torch.zeros(N, WIDTH), code_probs=torch.zeros(N, CODES)
        )


TABLES = torch.zeros(2, CODES, INNER)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"tables": TABLES[:1]}, ValueError, r"tables must have shape \[2, 5, 17\]"),
        ({"tables": TABLES.half()}, TypeError, "tables must be torch.float32"),
        ({"tables": TABLES.transpose(1, 2)}, ValueError, "tables must have shape"),
        ({"tables": TABLES.expand(2, 5, 17)[:, :, ::1].mT.contiguous().mT}, ValueError, "contig"),
        ({"codes": torch.full((N,), CODES)}, ValueError, r"codes must lie in \[-1, 5\)"),
        ({"w_gate": torch.zeros(INNER, HIDDEN)}, ValueError, "D >= 1"),
        ({"w_down": torch.zeros(HIDDEN, 3)}, ValueError, "w_down must have shape"),
        ({"e": torch.zeros(N, HIDDEN).half()}, TypeError, "w_gate must have e's dtype"),
    ],
)
def test_bad_input_of_a_step_is_named(change, kind, message) -> None:
    given = {name: t for name, t in inputs().items() if name != "codebook"}
    with pytest.raises(kind, match=f"gated_merge: .*{message}"):
        ops.gated_merge_step(**{**given, "tables": TABLES, **change})


def test_bad_input_of_tables_is_named() -> None:
    codebook, weight = torch.zeros(CODES, WIDTH), torch.zeros(INNER, HIDDEN + WIDTH)
    with pytest.raises(ValueError, match="w_gate must have shape"):
        ops.merge_tables(codebook, weight[:, :WIDTH], weight)
    with pytest.raises(TypeError, match="w_up must have codebook's dtype"):
        ops.merge_tables(codebook, weight, weight.half())
