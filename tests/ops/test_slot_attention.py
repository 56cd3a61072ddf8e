"""slot_attention: parity, ranges, strides, independence of the batch, compilation and errors."""

import pytest
import torch

from latent_rl import ops
from latent_rl.reference.slot_attention import slot_attention as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of outputs near 1: rounding of the output for the narrow dtypes, of sums for the wide ones.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
# (N, L, Hq, Hk, D, E): single heads, every remainder of the groups of 4 and 2, ragged widths.
SIZES = (
    (1, 1, 1, 1, 1, 1),
    (3, 9, 2, 2, 16, 16),
    (5, 40, 7, 1, 8, 24),
    (4, 33, 6, 2, 20, 13),
    (2, 130, 16, 4, 64, 64),
)
CASES = [(size, dtype) for size in SIZES for dtype in DTYPES]


def case_of(size, dtype):
    n, length, heads, key_heads, dim, value_dim = size
    generator = torch.Generator().manual_seed(sum(size))
    query = torch.randn(n, heads, dim, generator=generator).to(dtype)
    keys = torch.randn(n, length, key_heads, dim, generator=generator).to(dtype)
    values = torch.randn(n, length, key_heads, value_dim, generator=generator).to(dtype)
    ends = torch.randint(1, length + 1, (n,), generator=generator)
    begins = (torch.rand(n, generator=generator) * ends).long()
    return query, keys, values, begins, ends


def by_hand(query, keys, values, begins, ends, scale):
    """Row by row and head by head with torch's softmax, in float64."""
    out = torch.zeros(*query.shape[:2], values.shape[-1], dtype=torch.float64)
    group = query.shape[1] // keys.shape[2]
    for n in range(query.shape[0]):
        seen = slice(int(begins[n]), int(ends[n]))
        for h in range(query.shape[1]):
            k, v = (t[n, seen, h // group].double() for t in (keys, values))
            out[n, h] = (k @ query[n, h].double() * scale).softmax(0) @ v
    return out


@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_equals_the_definition(backend, size, dtype) -> None:
    query, keys, values, begins, ends = case_of(size, dtype)
    out = ops.slot_attention(query, keys, values, begins, ends, scale=0.3)
    expected = by_hand(query, keys, values, begins, ends, 0.3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * TOLERANCE[dtype])


def test_the_default_scale_and_torch_s_own_attention(backend) -> None:
    query, keys, values, _, ends = case_of(SIZES[4], torch.float32)
    out = ops.slot_attention(query, keys, values, torch.zeros_like(ends), ends)
    mask = (torch.arange(keys.shape[1]) < ends[:, None])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None],
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, expected[:, :, 0], rtol=1e-5, atol=1e-6)


def test_what_is_hidden_is_never_read(backend) -> None:
    query, keys, values, _, _ = case_of(SIZES[3], torch.float32)
    begins, ends = torch.tensor([0, 3, 30, 32]), torch.tensor([1, 9, 33, 33])
    expected = ops.slot_attention(query, keys, values, begins, ends)
    at = torch.arange(keys.shape[1])
    hidden = (at < begins[:, None]) | (at >= ends[:, None])
    keys[hidden], values[hidden] = torch.nan, torch.inf
    assert torch.equal(ops.slot_attention(query, keys, values, begins, ends), expected)


def test_empty_ranges_give_zeros_and_long_ones_are_clipped(backend) -> None:
    query, keys, values, _, _ = case_of(SIZES[1], torch.float32)
    begins, ends = torch.tensor([4, -7, 20]), torch.tensor([4, 99, 30])
    out = ops.slot_attention(query, keys, values, begins, ends)
    assert (out[[0, 2]] == 0).all()
    whole = ops.slot_attention(query, keys, values, torch.zeros(3).long(), torch.full((3,), 9))
    assert torch.equal(out[1], whole[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(backend, dtype) -> None:
    query, keys, values, begins, ends = case_of(SIZES[4], dtype)
    out = ops.slot_attention(100 * query, 100 * keys, values, begins, ends)
    best = by_hand(100 * query, 100 * keys, values, begins, ends, 64**-0.5)
    torch.testing.assert_close(out.double(), best, rtol=0, atol=40 * TOLERANCE[dtype])


def test_strided_input(backend) -> None:
    query, keys, values, begins, ends = case_of(SIZES[3], torch.float32)
    expected = ops.slot_attention(query, keys, values, begins, ends)
    # Heads before positions, every other number of the query, a slice of a longer store.
    store = torch.cat([keys, keys], 1).transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.stack([query, query], -1)[..., 0]
    wide_values = torch.stack([values, values], -1)[..., 0]
    out = ops.slot_attention(wide, store[:, : keys.shape[1]], wide_values, begins, ends)
    # Where a copy is made torch may sum in another order.
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_a_row_is_independent_of_its_batch_and_of_threads(backend) -> None:
    query, keys, values, begins, ends = case_of((40, 64, 8, 2, 32, 32), torch.float32)
    whole = ops.slot_attention(query, keys, values, begins, ends)
    part = ops.slot_attention(*(t[7:9] for t in (query, keys, values, begins, ends)))
    if backend == "native":
        assert torch.equal(whole[7:9], part)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        assert torch.equal(ops.slot_attention(query, keys, values, begins, ends), whole)
        torch.set_num_threads(before)
    else:
        # torch's batched products may sum in another order for another batch.
        torch.testing.assert_close(whole[7:9], part, rtol=0, atol=2e-6)


def test_no_rows(backend) -> None:
    empty = torch.zeros(0, 4, 8), torch.zeros(0, 5, 2, 8), torch.zeros(0, 5, 2, 3)
    ids = torch.zeros(0, dtype=torch.int64)
    assert ops.slot_attention(*empty, ids, ids).shape == (0, 4, 3)


def test_opcheck_and_fullgraph(backend) -> None:
    args = case_of(SIZES[2], torch.float32)
    torch.library.opcheck(torch.ops.latent_rl.slot_attention.default, (*args, 0.5))
    compiled = torch.compile(ops.slot_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), ops.slot_attention(*args))


def test_float64_equals_the_reference_closely() -> None:
    args = case_of(SIZES[4], torch.float64)
    out = ops.slot_attention(*args, scale=0.125)
    torch.testing.assert_close(out, reference(*args, 0.125), rtol=0, atol=1e-13)


def test_bad_input_is_named(backend) -> None:
    query, keys, values, begins, ends = case_of(SIZES[3], torch.float32)
    with pytest.raises(ValueError, match=r"query must have shape \[N, Hq, D\], got"):
        ops.slot_attention(query[0], keys, values, begins, ends)
    with pytest.raises(TypeError, match="keys must have query's dtype"):
        ops.slot_attention(query, keys.half(), values, begins, ends)
    with pytest.raises(ValueError, match=r"values must have shape \[4, 33, 2, 13\]"):
        ops.slot_attention(query, keys, values[:, :5], begins, ends)
    with pytest.raises(ValueError, match=r"query heads \(5\) must be a multiple of 2"):
        ops.slot_attention(query[:, :5], keys, values, begins, ends)
    with pytest.raises(TypeError, match="ends must be int64"):
        ops.slot_attention(query, keys, values, begins, ends.int())
    with pytest.raises(ValueError, match=r"begins must have shape \[4\], got \[3\]"):
        ops.slot_attention(query, keys, values, begins[:3], ends)
    with pytest.raises(ValueError, match="L = 0"):
        ops.slot_attention(query, keys[:, :0], values[:, :0], begins, ends)
