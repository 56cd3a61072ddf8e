"""The exact search of what the screen left undecided, and distances, in float64."""

from __future__ import annotations

import triton
import triton.language as tl
from latent_rl.kernels.nearest_code.screen import (
    WORST,
    add_product,
    code_tile,
    scores_of,
    screen_operand,
)


@triton.jit
def exact_values(
    x_rows,  # pointers [BLOCK_N, 1]
    code_rows,  # pointers [BLOCK_N, 1]
    wanted,  # bool [BLOCK_N]
    D: tl.constexpr,
    METRIC: tl.constexpr,
    WITH_DISTANCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What orders the codes of a row, or the distance itself; float64 [BLOCK_N].

    Equal codes get bitwise equal values: the order of the sum depends on D alone.
    """
    BLOCK_N: tl.constexpr = x_rows.shape[0]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    length = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    x_length = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = wanted[:, None] & (d < D)[None, :]
        x = tl.load(x_rows + d[None, :], mask=inside, other=0.0).to(tl.float64)
        c = tl.load(code_rows + d[None, :], mask=inside, other=0.0).to(tl.float64)
        if METRIC == 0:
            total += (x - c) * (x - c)
        else:
            total += x * c
        if METRIC == 1:
            length += c * c
            if WITH_DISTANCE:
                x_length += x * x
    value = tl.sum(total, 1)
    if METRIC == 1:
        norm = tl.sqrt(tl.sum(length, 1))
        if WITH_DISTANCE:
            norm = norm * tl.sqrt(tl.sum(x_length, 1))
        # A vector of length zero has cosine 0.
        value = tl.where(norm > 0.0, value / norm, 0.0)
        value = 1.0 - value if WITH_DISTANCE else -value
    if METRIC == 2:
        value = -value
    return value


@triton.jit
def finite_rows(x_rows, row_ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which rows have no NaN and no infinity."""
    broken = tl.zeros((x_rows.shape[0],), tl.int32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
        wide = x.to(tl.float32)
        # inf - inf and NaN - NaN are not 0: the one test that catches both.
        broken += tl.sum(((wide - wide) != 0.0).to(tl.int32), 1)
    return row_ok & (broken == 0)


@triton.jit(do_not_specialize=["N"])
def _nearest_code_rerank_kernel(
    x_ptr,  # [G, N, D], rows contiguous
    codebook_ptr,  # [G, K, D]
    table_ptr,  # [G, K, D] codes as prepared
    bias_ptr,  # float32 [G, K]
    scale_ptr,  # float32 [G, K]
    shift_ptr,  # float32 [G, D]
    code_ptr,  # int64 [G, N] out, of the rows listed
    list_ptr,  # int64 [G, N]
    threshold_ptr,  # float32 [G, N]
    count_ptr,  # int32 [G]
    N,
    stride_g,
    stride_n,
    K: tl.constexpr,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    ROUND: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT_D: tl.constexpr,
):
    """Screen the listed rows again; of every code within the bound take the exact distance.

    The number of rows is read on the device: programs stride over tiles of the list.
    """
    group = tl.program_id(1).to(tl.int64)
    count = tl.load(count_ptr + group).to(tl.int64)
    table_ptr += group * K * D
    codebook_ptr += group * K * D
    bias_ptr += group * K
    scale_ptr += group * K
    shift_ptr += group * D
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    while first < count:
        places = first + tl.arange(0, BLOCK_N)
        row_ok = places < count
        rows = tl.load(list_ptr + group * N + places, mask=row_ok, other=0)
        threshold = tl.load(threshold_ptr + group * N + places, mask=row_ok, other=0.0)
        x_rows = x_ptr + (group * stride_g + rows * stride_n)[:, None]
        valid = finite_rows(x_rows, row_ok, D, BLOCK_D)
        least = tl.full((BLOCK_N,), float("inf"), tl.float64)
        code = tl.full((BLOCK_N,), -1, tl.int64)
        for start in range(0, K, BLOCK_K):
            codes = start + tl.arange(0, BLOCK_K)
            product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for start_d in range(0, D, BLOCK_D):
                d = start_d + tl.arange(0, BLOCK_D)
                left, _, _ = screen_operand(x_rows, shift_ptr, d, row_ok, D, ROUND, SHIFT)
                product = add_product(product, left, code_tile(table_ptr, codes, d, K, D))
            score = scores_of(product, bias_ptr, scale_ptr, codes, K, SCALED)
            bias = tl.load(bias_ptr + codes, mask=codes < K, other=-3.0e38)
            # Not "at least": a NaN on either side makes a candidate.
            candidate = ~(score < threshold[:, None]) & valid[:, None] & (bias > WORST)[None, :]
            waiting = candidate.to(tl.int32)
            while tl.sum(waiting) > 0:
                # Every row takes its lowest waiting code: ids grow, so the lowest wins a tie.
                column = tl.argmax(waiting, 1, tie_break_left=True)
                wanted = tl.max(waiting, 1) > 0
                chosen = start + column.to(tl.int64)
                value = exact_values(
                    x_rows,
                    codebook_ptr + (chosen * D)[:, None],
                    wanted,
                    D,
                    METRIC,
                    False,
                    EXACT_D,
                )
                nearer = wanted & (value < least)
                code = tl.where(nearer, chosen, code)
                least = tl.where(nearer, value, least)
                taken = tl.arange(0, BLOCK_K)[None, :] == column[:, None]
                waiting = tl.where(taken, 0, waiting)
        tl.store(code_ptr + group * N + rows, code, mask=row_ok)
        first += tl.num_programs(0).to(tl.int64) * BLOCK_N


@triton.jit(do_not_specialize=["N"])
def _nearest_code_distance_kernel(
    x_ptr,  # [G, N, D], rows contiguous
    codebook_ptr,  # [G, K, D]
    code_ptr,  # int64 [G, N]
    distance_ptr,  # float32 [G, N] out
    N,
    stride_g,
    stride_n,
    K: tl.constexpr,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Distance of the code chosen: anew in float64, since the screen's score has cancelled."""
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    code = tl.load(code_ptr + group * N + rows, mask=row_ok, other=-1)
    value = exact_values(
        x_ptr + (group * stride_g + rows * stride_n)[:, None],
        codebook_ptr + ((group * K + tl.maximum(code, 0)) * D)[:, None],
        code >= 0,
        D,
        METRIC,
        True,
        BLOCK_D,
    )
    value = tl.where(code >= 0, value, float("nan"))
    tl.store(distance_ptr + group * N + rows, value.to(tl.float32), mask=row_ok)
