"""Grouping rows by code and summing them, on the emulator."""

import pytest
import torch

from latent_rl.native import _segments_cuda as segments

from .memory import fenced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def module(emulated):
    return emulated("segments", modules=("_segments_cuda",))


def codes_of(rows: int, num_codes: int) -> torch.Tensor:
    """Some invalid, some codes unused."""
    codes = torch.randint(-1, num_codes, (rows,))
    return fenced(codes.where(codes % 5 != 3, 0))


def check_grouped(grouped: segments.GroupedRows, codes: torch.Tensor, num_codes: int) -> None:
    buckets = codes.where(codes >= 0, num_codes)
    order = buckets.sort(stable=True).indices
    assert torch.equal(grouped.placed[:, 0].long(), order)
    assert torch.equal(grouped.placed[:, 1].long(), buckets[order])
    counts = torch.bincount(buckets, minlength=num_codes + 1)
    assert torch.equal(grouped.counts, counts[:-1])
    assert torch.equal(grouped.first.long(), counts.cumsum(0) - counts)


@pytest.mark.parametrize(
    ("rows", "num_codes"),
    # One block sorts those before the last two: at 1200 codes a thread scans two of them.
    [(1, 1), (31, 2), (1000, 7), (2500, 130), (5000, 1200), (16384, 3), (16385, 3), (100, 9000)],
)
def test_grouping_is_a_stable_sort(module, in_every_order, rows, num_codes) -> None:
    codes = codes_of(rows, num_codes)
    check_grouped(
        in_every_order(module, lambda: segments.group_rows(codes, num_codes)), codes, num_codes
    )


def test_many_chunks(module, in_every_order) -> None:
    # More than thirty-two chunks of a thousand rows: the scan over chunks takes two rounds.
    codes = codes_of(40_000, 3)
    check_grouped(in_every_order(module, lambda: segments.group_rows(codes, 3)), codes, 3)


def test_codes_outside_the_codebook_have_no_row(module) -> None:
    codes = torch.tensor([3, -7, 2**40, 0, 3])
    grouped = segments.group_rows(codes, 4)
    assert grouped.placed.tolist() == [[3, 0], [0, 3], [4, 3], [1, 4], [2, 4]]
    assert grouped.first.tolist() == [0, 1, 1, 1, 3]


def test_no_rows(module, in_every_order) -> None:
    def call():
        grouped = segments.group_rows(torch.empty(0, dtype=torch.int64), 3)
        return grouped.counts, segments.segment_sum(torch.empty(0, 5), grouped)

    counts, sums = in_every_order(module, call)
    assert counts.tolist() == [0, 0, 0]
    assert sums.eq(0).all()


def expected_sums(values, codes, num_codes):
    one_hot = torch.nn.functional.one_hot(codes.clamp(min=0), num_codes) * (codes >= 0)[:, None]
    return one_hot.double().T @ values.double()


def check_sums(module, in_every_order, values, codes, num_codes) -> None:
    def call():
        return segments.segment_sum(values, segments.group_rows(codes, num_codes))

    got = in_every_order(module, call)
    # At most 64 float32 additions one after another, of values of order one.
    torch.testing.assert_close(
        got.double(), expected_sums(values, codes, num_codes), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_codes", "width"),
    [(1, 1, 1), (37, 5, 8), (300, 7, 24), (200, 2, 19), (65, 3, 600)],
)
def test_sums_equal_float64_s(module, in_every_order, rows, num_codes, width, dtype) -> None:
    values = fenced(torch.randn(rows, width).to(dtype))
    check_sums(module, in_every_order, values, codes_of(rows, num_codes), num_codes)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_one_code_with_every_row(module, in_every_order, code) -> None:
    check_sums(module, in_every_order, torch.randn(2000, 8), torch.full((2000,), code), 3)


def test_codes_that_end_where_tiles_end(module, in_every_order) -> None:
    # Tiles of this size hold eight rows.
    codes = torch.arange(64) // 8
    check_sums(module, in_every_order, torch.randn(64, 4), codes, 8)
    check_sums(module, in_every_order, torch.randn(64, 4), (torch.arange(64) + 1) // 16, 5)


def test_strided_and_misaligned_values(module, in_every_order) -> None:
    codes = codes_of(100, 6)
    base = torch.randn(100, 3, 16)
    aligned = base[:, 1].contiguous()
    grouped = segments.group_rows(codes, 6)
    expected = segments.segment_sum(aligned, grouped)
    assert torch.equal(segments.segment_sum(base[:, 1], grouped), expected)
    shifted = torch.cat([torch.zeros(1), aligned.flatten()])[1:].view(100, 16)
    assert shifted.data_ptr() % 16 != 0
    assert torch.equal(segments.segment_sum(shifted, grouped), expected)
    check_sums(module, in_every_order, torch.randn(16, 100).T, codes, 6)
