"""gated_merge on the Triton backend; run by test_gated_merge_triton.py with TRITON_INTERPRET=1."""

from dataclasses import replace

import pytest
import torch
from latent_rl.kernels.gated_merge import triton_impl

from latent_rl import ops
from latent_rl.reference import gated_merge as reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.bfloat16, torch.float16)
# A pre-activation is rounded once, an output after a second product of rounded activations.
PRE_ACTIVATION = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
OUTPUT = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = (
    # N, H, D, I, K: one of each; ragged everywhere; several tiles of each side and several groups
    (1, 1, 1, 1, 1),
    (37, 19, 7, 21, 5),
    (70, 32, 8, 32, 3),
    (300, 33, 16, 40, 9),
)
TILE = triton_impl.Config(16, 16, 16, 4, 2)


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("LATENT_RL_BACKEND", "gated_merge=triton")
    # Small tiles, so that small inputs have many.
    monkeypatch.setattr(triton_impl, "config_for", lambda n, device: TILE)


def inputs(shape, dtype):
    rows, hidden, width, inner, num_codes = shape
    torch.manual_seed(rows)

    def normal(*sizes):
        return (torch.randn(*sizes) / sizes[-1] ** 0.5).to(dtype)

    return [
        torch.randn(rows, hidden).to(dtype),
        torch.randint(num_codes, (rows,)),
        torch.randn(num_codes, width).to(dtype),
        normal(inner, hidden + width),
        normal(inner, hidden + width),
        normal(hidden, inner),
    ]


def check(given):
    dtype = given[0].dtype
    got = triton_impl.gated_merge_forward(*given)
    wide = [t.double() if t.is_floating_point() else t for t in given]
    exact = reference.gated_merge_forward(*wide)
    assert all(mine.dtype == dtype for mine in got)
    bound = OUTPUT[dtype]
    torch.testing.assert_close(got[0].double(), exact[0], rtol=bound, atol=bound)
    bound = PRE_ACTIVATION[dtype]
    for mine, theirs in zip(got[1:], exact[1:], strict=True):
        # The products' own float32 roundings, and float16's steps near zero.
        torch.testing.assert_close(mine.double(), theirs, rtol=bound, atol=2e-6)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape, dtype) -> None:
    check(inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_with_tables_is_the_forward(shape, dtype) -> None:
    """Bit for bit: the same kernel on the same table."""
    given = inputs(shape, dtype)
    given[1][0] = -1
    e, codes, codebook, *weights = given
    tables = ops.merge_tables(codebook, *weights[:2])
    got = ops.gated_merge_step(e, codes, tables, *weights)
    expected = triton_impl.gated_merge_forward(*given)[0]
    assert got.dtype == dtype
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert got[0].isnan().all()


def test_rows_without_a_code() -> None:
    given = inputs(SHAPES[1], torch.float16)
    given[1][[3, 36]] = -1
    out = triton_impl.gated_merge_forward(*given)[0]
    assert out.isnan().all(1).nonzero().flatten().tolist() == [3, 36]
    assert out.isnan().any(1).sum() == 2


def test_strides_do_not_show() -> None:
    given = inputs(SHAPES[2], torch.float16)
    expected = triton_impl.gated_merge_forward(*given)
    e = torch.randn(70, 2, 32).half()
    e[:, 1] = given[0]
    padded = torch.nn.functional.pad(given[4], (0, 5))[:, :40]
    views = [e[:, 1], *given[1:3], given[3].T.contiguous().T, padded, given[5]]
    for mine, theirs in zip(triton_impl.gated_merge_forward(*views), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_rows_pre_activations_do_not_depend_on_its_batch_or_tile(monkeypatch) -> None:
    given = inputs(SHAPES[3], torch.float16)
    whole = triton_impl.gated_merge_forward(*given)
    monkeypatch.setattr(triton_impl, "config_for", lambda n, device: replace(TILE, block_n=32))
    part = triton_impl.gated_merge_forward(given[0][100:130], given[1][100:130], *given[2:])
    for mine, theirs in zip(part[1:], whole[1:], strict=True):
        assert torch.equal(mine, theirs[100:130])


def test_no_rows() -> None:
    given = inputs(SHAPES[1], torch.float16)
    given[:2] = given[0][:0], given[1][:0]
    assert ops.gated_merge(*given).shape == (0, 19)


def test_the_public_op_is_served() -> None:
    given = inputs(SHAPES[1], torch.float16)
    assert torch.equal(ops.gated_merge(*given), triton_impl.gated_merge_forward(*given)[0])


def test_float32_is_declined() -> None:
    with pytest.raises(RuntimeError, match="float32 has no matrix unit"):
        ops.gated_merge(*inputs(SHAPES[1], torch.float32))
