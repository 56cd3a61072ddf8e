"""quantize and gated_merge in C++ against small numpy oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latent_rl import _C
from latent_rl.native._call import dtype_code
from latent_rl.native._products import product_dtype
from latent_rl.native._segments import segment_sum
from latent_rl.native.gated_merge import gated_merge_backward, gated_merge_forward
from latent_rl.native.quantize import quantize_backward, quantize_forward

# One rounding to the dtype.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("dim", [1, 9, 300])
def test_segment_sum(isa: str, dtype: torch.dtype, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    values = torch.randn(200, dim, generator=generator).to(dtype)
    codes = torch.randint(-1, 6, (200,), generator=generator)
    expected = np.zeros((7, dim))
    for row in range(200):
        if codes[row] >= 0:
            expected[codes[row]] += values[row].double().numpy()
    got = segment_sum(values, codes, 7)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-5)
    assert not got[6].any()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_quantize_against_the_oracle(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(90, 21, generator=generator).to(dtype)
    codebook = torch.randn(14, 21, generator=generator).to(dtype)
    x[11, 4] = torch.nan
    codes, quantized, error, counts, sums, perplexity = quantize_forward(x, codebook, "l2")
    valid = [r for r in range(90) if r != 11]
    rows, table = x.double().numpy()[valid], codebook.double().numpy()
    nearest = ((rows[:, None] - table[None]) ** 2).sum(-1).argmin(1)
    assert codes[valid].tolist() == nearest.tolist()
    assert codes[11] == -1
    assert quantized[11].isnan().all()
    assert torch.equal(quantized[valid], codebook[codes[valid]])
    np.testing.assert_allclose(float(error), ((rows - table[nearest]) ** 2).mean(), rtol=1e-6)
    assert counts.tolist() == np.bincount(nearest, minlength=14).tolist()
    expected = np.stack([rows[nearest == k].sum(0) for k in range(14)])
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-6, atol=1e-5)
    share = np.bincount(nearest, minlength=14) / len(nearest)
    share = share[share > 0]
    np.testing.assert_allclose(float(perplexity), np.exp(-(share * np.log(share)).sum()), rtol=1e-6)

    grad = torch.randn(90, 21, generator=generator).to(dtype)
    dx, dcodebook = quantize_backward(
        grad, torch.tensor(0.25), torch.tensor(2.0), x, codebook, codes, counts, sums
    )
    per_element = 2 / (len(valid) * 21)
    expected = grad.double().numpy()[valid] + 0.25 * per_element * (rows - table[nearest])
    tolerance = ROUNDING[dtype]
    np.testing.assert_allclose(dx.double().numpy()[valid], expected, rtol=tolerance, atol=tolerance)
    assert not dx[11].any()
    pull = counts.double().numpy()[:, None] * table - sums.double().numpy()
    np.testing.assert_allclose(
        dcodebook.double().numpy(),
        2.0 * per_element * pull,
        rtol=tolerance,
        atol=max(tolerance, 1e-6),
    )


def test_quantize_without_a_valid_row(isa: str) -> None:
    x = torch.full((3, 4), torch.nan)
    codes, _, error, counts, sums, perplexity = quantize_forward(x, torch.ones(2, 4), "l2")
    assert codes.tolist() == [-1, -1, -1]
    assert (float(error), float(perplexity)) == (0.0, 1.0)
    assert not counts.any()
    assert not sums.any()


def test_an_unused_code_that_is_not_finite_has_no_gradient(isa: str) -> None:
    x, codebook = torch.ones(3, 2), torch.tensor([[1.0, 2.0], [torch.inf, 0.0]])
    codes, _, _, counts, sums, _ = quantize_forward(x, codebook, "l2")
    one = torch.tensor(1.0)
    dcodebook = quantize_backward(torch.zeros(3, 2), one, one, x, codebook, codes, counts, sums)[1]
    assert dcodebook[1].tolist() == [0.0, 0.0]
    assert dcodebook.isfinite().all()


def merge_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    e, codebook = torch.randn(23, 6, generator=generator), torch.randn(5, 7, generator=generator)
    codes = torch.randint(0, 5, (23,), generator=generator)
    w_gate, w_up = torch.randn(2, 19, 13, generator=generator) / 3
    w_down = torch.randn(6, 19, generator=generator) / 4
    return (e.to(dtype), codes, *(t.to(dtype) for t in (codebook, w_gate, w_up, w_down)))


def plain_merge(
    e: torch.Tensor,
    vectors: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
) -> torch.Tensor:
    joined = torch.cat([e, vectors], 1)
    gate = joined @ w_gate.T
    return (gate * gate.sigmoid() * (joined @ w_up.T)) @ w_down.T


# Products of 13 and 19 terms in float32. Where the processor multiplies bfloat16 the table, the
# pre-activations, the activation and the output are rounded to it; elsewhere the output alone.
MERGE_TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-12,
    torch.bfloat16: 3e-2,
    torch.float16: 2e-3,
}


@pytest.mark.parametrize("dtype", MERGE_TOLERANCE)
def test_gated_merge_forward(isa: str, dtype: torch.dtype) -> None:
    e, codes, codebook, *weights = merge_inputs(dtype)
    codes[4] = -1
    out, pre_gate, pre_up = gated_merge_forward(e, codes, codebook, *weights)
    wide = [t.double() for t in weights]
    expected = plain_merge(e.double(), codebook.double()[codes], *wide)
    valid = codes >= 0
    assert out[4].isnan().all()
    tolerance = MERGE_TOLERANCE[dtype]
    torch.testing.assert_close(out[valid].double(), expected[valid], rtol=tolerance, atol=tolerance)
    assert pre_gate.shape == pre_up.shape == (23, 19)


@pytest.mark.parametrize("stand_in", ["codebook", "vectors", "probs"])
def test_gated_merge_backward_against_autograd(isa: str, stand_in: str) -> None:
    e, codes, codebook, *weights = merge_inputs(torch.float64)
    grad = torch.randn(23, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, pre_gate, pre_up = gated_merge_forward(e, codes, codebook, *weights)
    leaves = [t.clone().requires_grad_() for t in (e, codebook, *weights)]
    probs = torch.nn.functional.one_hot(codes, 5).double().requires_grad_()
    vectors = (probs @ leaves[1]).detach().requires_grad_() if stand_in == "vectors" else None
    used = probs @ leaves[1] if vectors is None else vectors
    plain_merge(leaves[0], used, *leaves[2:]).backward(grad)
    got = gated_merge_backward(
        grad,
        e,
        codes,
        codebook,
        *weights,
        pre_gate,
        pre_up,
        stand_in == "vectors",
        stand_in == "probs",
    )
    for ours, leaf in zip(got[:5], leaves, strict=True):
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    if vectors is not None:
        torch.testing.assert_close(got[5], vectors.grad, rtol=1e-9, atol=1e-11)
    else:
        assert got[5] is None
    if stand_in == "probs":
        torch.testing.assert_close(got[6], probs.grad, rtol=1e-9, atol=1e-11)
    else:
        assert got[6] is None


def test_a_row_without_a_code_passes_no_gradient(isa: str) -> None:
    e, codes, codebook, *weights = merge_inputs(torch.float32)
    grad = torch.ones(23, 6)
    kept = [r for r in range(23) if r != 9]
    _, gate, up = gated_merge_forward(e, codes, codebook, *weights)
    without = gated_merge_backward(
        grad[kept], e[kept], codes[kept], codebook, *weights, gate[kept], up[kept], False, False
    )
    codes[9], e[9] = -1, torch.nan
    got = gated_merge_backward(grad, e, codes, codebook, *weights, gate, up, False, False)
    assert not got[0][9].any()
    for ours, expected in zip(got[1:5], without[1:5], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_statistics_do_not_depend_on_threads_or_instruction_set(every_isa: list[str]) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3000, 40, generator=generator)
    codebook = torch.randn(20, 40, generator=generator)
    expected = None
    for name in every_isa:
        _C.select_isa(name)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = quantize_forward(x, codebook, "l2")
            expected = expected or got
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_bfloat16_is_multiplied_as_it_is_only_where_the_processor_can(isa: str) -> None:
    narrow = isa == "avx512bf16" and torch.backends.mkldnn.is_available()
    assert product_dtype(torch.bfloat16) == (torch.bfloat16 if narrow else torch.float32)
    assert product_dtype(torch.float16) == product_dtype(torch.float32) == torch.float32
    assert product_dtype(torch.float64) == torch.float64


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("width", [1, 16, 37])
def test_merge_adds_tables_and_rounds_once(isa: str, dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gate, up = torch.randn(2, 6, width, generator=generator).to(dtype)
    tables = torch.randn(2, 3, width, generator=generator).to(wide)
    gate[1, 0], tables[0, 2, 0] = torch.inf, -torch.inf
    codes = torch.tensor([0, 2, -1, 1, 1, 0])
    sums = [pre.to(wide) + table[codes] for pre, table in zip((gate, up), tables, strict=True)]
    out = torch.empty(6, width, dtype=dtype)
    code, addresses = dtype_code("merge", gate), [t.data_ptr() for t in (*tables, codes, out)]
    _C.merge_forward(code, gate.data_ptr(), up.data_ptr(), *addresses, 6, 3, width, 1)
    valid = codes >= 0
    # The sum of opposite infinities is NaN, and stays so.
    assert gate[1, 0].isnan()
    assert torch.equal(gate[valid].nan_to_num(7.0), sums[0].to(dtype)[valid].nan_to_num(7.0))
    assert torch.equal(up[valid], sums[1].to(dtype)[valid])
    expected = (torch.nn.functional.silu(sums[0]) * sums[1]).double()
    tolerance = ROUNDING[dtype]
    torch.testing.assert_close(
        out[valid].double(), expected[valid], rtol=tolerance, atol=tolerance, equal_nan=True
    )
    assert out[2].isnan().all()
    # Without tables the pre-activations are whole and stay untouched.
    before = gate.clone(), up.clone()
    addresses[:2] = [0, 0]
    _C.merge_forward(code, gate.data_ptr(), up.data_ptr(), *addresses, 6, 3, width, 1)
    assert torch.equal(gate.nan_to_num(7.0), before[0].nan_to_num(7.0))
    assert torch.equal(up, before[1])
    expected = (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).double()
    torch.testing.assert_close(
        out[valid].double(), expected[valid], rtol=tolerance, atol=tolerance, equal_nan=True
    )
    with pytest.raises(ValueError, match="both tables or neither"):
        _C.merge_forward(
            code, gate.data_ptr(), up.data_ptr(), 0, *addresses[2:3], *addresses[2:], 6, 3, width, 1
        )


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_codes_in_use(rows: int) -> None:
    codes = torch.randint(-1, 9, (rows,), generator=torch.Generator().manual_seed(rows))
    used, entry = torch.empty(9, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    count = _C.codes_in_use(codes.data_ptr(), used.data_ptr(), entry.data_ptr(), rows, 9)
    assert used[:count].tolist() == sorted({code for code in codes.tolist() if code >= 0})
    valid = codes >= 0
    assert torch.equal(used[entry[valid]], codes[valid])
    assert entry[~valid].eq(-1).all()
