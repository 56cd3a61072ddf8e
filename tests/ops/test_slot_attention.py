"""slot_attention: parity, runs, strides, independence of the batch, compilation and errors."""

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


def runs_of(begins, ends, length, shared=None):
    """Two rows share a run; every row has a slot of its own; a hole lies in front of all."""
    n = len(ends)
    shared = torch.zeros(n).long() if shared is None else shared
    row = torch.arange(n)
    shared_at = 1 + row // 2 * length
    own_at = 1 + (n + 1) // 2 * length + row * length
    return torch.stack([begins, ends, shared_at, shared, own_at], 1)


def case_of(size, dtype):
    """query, keys, values, runs, longest."""
    n, length, heads, key_heads, dim, value_dim = size
    generator = torch.Generator().manual_seed(sum(size))
    positions = 1 + ((n + 1) // 2 + n) * length
    query = torch.randn(n, heads, dim, generator=generator).to(dtype)
    keys = torch.randn(positions, key_heads, dim, generator=generator).to(dtype)
    values = torch.randn(positions, key_heads, value_dim, generator=generator).to(dtype)
    ends = torch.randint(1, length + 1, (n,), generator=generator)
    begins = (torch.rand(n, generator=generator) * ends).long()
    # Some rows share nothing, some see nothing but what they share.
    shared = torch.randint(0, length + 1, (n,), generator=generator)
    return query, keys, values, runs_of(begins, ends, length, shared), length


def places(run):
    """Where the visible positions of one row lie."""
    begin, end, shared_at, shared, own_at = run.tolist()
    return [shared_at + j if j < shared else own_at + j - shared for j in range(begin, end)]


def attend(query, keys, values, runs, longest, scale=None):
    return ops.slot_attention(query, keys, values, runs, longest=longest, scale=scale)


def by_hand(query, keys, values, runs, scale):
    """Row by row and head by head with torch's softmax, in float64."""
    out = torch.zeros(*query.shape[:2], values.shape[-1], dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for n in range(query.shape[0]):
        seen = places(runs[n])
        for h in range(query.shape[1]):
            k, v = (t[seen, h // group].double() for t in (keys, values))
            out[n, h] = (k @ query[n, h].double() * scale).softmax(0) @ v
    return out


@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_equals_the_definition(backend, size, dtype) -> None:
    query, keys, values, runs, longest = case_of(size, dtype)
    out = attend(query, keys, values, runs, longest, 0.3)
    expected = by_hand(query, keys, values, runs, 0.3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * TOLERANCE[dtype])


def test_the_default_scale_and_torch_s_own_attention(backend) -> None:
    query, keys, values, runs, longest = case_of(SIZES[4], torch.float32)
    runs[:, 0] = 0
    at = torch.tensor([places(torch.cat([torch.tensor([0, longest]), run[2:]])) for run in runs])
    mask = (torch.arange(longest) < runs[:, 1:2])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None],
        keys[at].transpose(1, 2),
        values[at].transpose(1, 2),
        attn_mask=mask,
        enable_gqa=True,
    )
    out = attend(query, keys, values, runs, longest)
    torch.testing.assert_close(out, expected[:, :, 0], rtol=1e-5, atol=1e-6)


def test_where_the_positions_lie_does_not_matter(backend) -> None:
    query, keys, values, runs, longest = case_of(SIZES[3], torch.float64)
    expected = attend(query, keys, values, runs, longest)
    # The same rows, each with everything in a run of its own.
    at = [places(torch.cat([torch.tensor([0, longest]), run[2:]])) for run in runs]
    flat = torch.tensor(at).flatten()
    alone = runs.clone()
    alone[:, 2:4] = 0
    alone[:, 4] = torch.arange(len(runs)) * longest
    out = attend(query, keys[flat], values[flat], alone, longest)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_what_is_hidden_is_never_read(backend) -> None:
    query, keys, values, _, longest = case_of(SIZES[3], torch.float32)
    begins, ends = torch.tensor([0, 3, 30, 32]), torch.tensor([1, 9, 33, 33])
    runs = runs_of(begins, ends, longest, torch.tensor([9, 5, 31, 0]))
    expected = attend(query, keys, values, runs, longest)
    hidden = torch.ones(len(keys), dtype=torch.bool)
    for run in runs:
        hidden[places(run)] = False
    keys[hidden], values[hidden] = torch.nan, torch.inf
    assert torch.equal(attend(query, keys, values, runs, longest), expected)


def test_empty_ranges_give_zeros_and_long_ones_are_clipped(backend) -> None:
    query, keys, values, _, longest = case_of(SIZES[1], torch.float32)
    shared = torch.tensor([3, 3, 3])
    runs = runs_of(torch.tensor([4, -7, 20]), torch.tensor([4, 99, 30]), longest, shared)
    out = attend(query, keys, values, runs, longest)
    assert (out[[0, 2]] == 0).all()
    whole = attend(
        query,
        keys,
        values,
        runs_of(torch.zeros(3).long(), torch.full((3,), longest), longest, shared),
        longest,
    )
    assert torch.equal(out[1], whole[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(backend, dtype) -> None:
    query, keys, values, runs, longest = case_of(SIZES[4], dtype)
    out = attend(100 * query, 100 * keys, values, runs, longest)
    best = by_hand(100 * query, 100 * keys, values, runs, 64**-0.5)
    torch.testing.assert_close(out.double(), best, rtol=0, atol=40 * TOLERANCE[dtype])


def test_strided_input(backend) -> None:
    query, keys, values, runs, longest = case_of(SIZES[3], torch.float32)
    expected = attend(query, keys, values, runs, longest)
    # Heads before positions, every other number, rows of a wider table.
    store = keys.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.stack([query, query], -1)[..., 0]
    wide_values = torch.stack([values, values], -1)[..., 0]
    wide_runs = torch.stack([runs, runs], 1)[:, 0]
    out = attend(wide, store, wide_values, wide_runs, longest)
    # Where a copy is made torch may sum in another order.
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_a_row_is_independent_of_its_batch_and_of_threads(backend) -> None:
    query, keys, values, runs, longest = case_of((40, 64, 8, 2, 32, 32), torch.float32)
    whole = attend(query, keys, values, runs, longest)
    part = attend(query[7:9], keys, values, runs[7:9], longest)
    if backend == "native":
        assert torch.equal(whole[7:9], part)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        assert torch.equal(attend(query, keys, values, runs, longest), whole)
        torch.set_num_threads(before)
    else:
        # torch's batched products may sum in another order for another batch.
        torch.testing.assert_close(whole[7:9], part, rtol=0, atol=2e-6)


def test_no_rows(backend) -> None:
    empty = torch.zeros(0, 4, 8), torch.zeros(5, 2, 8), torch.zeros(5, 2, 3)
    assert attend(*empty, torch.zeros(0, 5, dtype=torch.int64), 7).shape == (0, 4, 3)


def test_opcheck_and_fullgraph(backend) -> None:
    args = case_of(SIZES[2], torch.float32)
    torch.library.opcheck(torch.ops.latent_rl.slot_attention.default, (*args, 0.5))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), attend(*args))


def test_float64_equals_the_reference_closely() -> None:
    args = case_of(SIZES[4], torch.float64)
    out = attend(*args, 0.125)
    torch.testing.assert_close(out, reference(*args, 0.125), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("run", "places"),
    [([0, 4, 30, 2, 5], "30 to 31"), ([0, 4, 0, 2, -1], "-1 to 0"), ([0, 9, 0, 0, 30], "30 to 38")],
)
def test_runs_outside_the_storage_are_refused(run, places) -> None:
    query, keys, values = torch.zeros(2, 2, 4), torch.zeros(31, 2, 4), torch.zeros(31, 2, 4)
    runs = torch.tensor([[0, 4, 0, 2, 5], run])
    with pytest.raises(ValueError, match=f"within the 31 positions of keys, got {places} in row 1"):
        attend(query, keys, values, runs, 9)


def test_bad_input_is_named(backend) -> None:
    query, keys, values, runs, longest = case_of(SIZES[3], torch.float32)
    with pytest.raises(ValueError, match=r"query must have shape \[N, Hq, D\], got"):
        attend(query[0], keys, values, runs, longest)
    with pytest.raises(TypeError, match="keys must have query's dtype"):
        attend(query, keys.half(), values, runs, longest)
    with pytest.raises(ValueError, match=r"values must have shape \[199, 2, 13\]"):
        attend(query, keys, values[:5], runs, longest)
    with pytest.raises(ValueError, match=r"query heads \(5\) must be a multiple of 2"):
        attend(query[:, :5], keys, values, runs, longest)
    with pytest.raises(TypeError, match="runs must be int64"):
        attend(query, keys, values, runs.int(), longest)
    with pytest.raises(ValueError, match=r"runs must have shape \[4, 5\], got \[3, 5\]"):
        attend(query, keys, values, runs[:3], longest)
    with pytest.raises(ValueError, match="S = 0"):
        attend(query, keys[:0], values[:0], runs, longest)
    with pytest.raises(ValueError, match="longest must be >= 1, got 0"):
        attend(query, keys, values, runs, 0)
