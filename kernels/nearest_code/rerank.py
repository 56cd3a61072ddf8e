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
    # Unrolled as far as registers go, so that the loads of several steps are under way at once.
    AHEAD: tl.constexpr = 4 if x_rows.dtype.element_ty.primitive_bitwidth == 16 else 1
    for start in tl.range(0, D, BLOCK_D, loop_unroll_factor=AHEAD):
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


@triton.jit
def _best_of_stretch(
    x_rows,  # pointers [BLOCK_N, 1]
    valid,  # bool [BLOCK_N]
    threshold,  # float32 [BLOCK_N]
    codebook_ptr,  # [K, D]
    table_ptr,  # [K, D]
    bias_ptr,
    scale_ptr,
    shift_ptr,
    first_code,
    past_code,
    K: tl.constexpr,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    ROUND: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT_D: tl.constexpr,
):
    """Least exact value float64 [BLOCK_N] of a stretch of codes, and its code; inf and -1: none."""
    BLOCK_N: tl.constexpr = x_rows.shape[0]
    least = tl.full((BLOCK_N,), float("inf"), tl.float64)
    code = tl.full((BLOCK_N,), -1, tl.int32)
    start = first_code
    while start < past_code:
        codes = start + tl.arange(0, BLOCK_K)
        product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start_d in range(0, D, BLOCK_D):
            d = start_d + tl.arange(0, BLOCK_D)
            left, _, _ = screen_operand(x_rows, shift_ptr, d, valid, D, ROUND, SHIFT)
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
            chosen = start + column
            value = exact_values(
                x_rows,
                codebook_ptr + (chosen.to(tl.int64) * D)[:, None],
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
        start += BLOCK_K
    return least, code


@triton.jit
def _merged_parts(value_ptr, part_code_ptr, arrived_ptr, tile, parts, part, least, code):
    """Leave a stretch's result; of the stretches of a tile the last to come merges all.

    In the order of their codes, whoever is last: the lowest id wins a tie. Returns whether this
    program is the one, with the merged result.
    """
    BLOCK_N: tl.constexpr = least.shape[0]
    lanes = tl.arange(0, BLOCK_N)
    places = (tile * parts) * BLOCK_N + lanes
    tl.store(value_ptr + places + part * BLOCK_N, least)
    tl.store(part_code_ptr + places + part * BLOCK_N, code)
    # All threads have stored before one of them says so, and read after it has heard.
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
    tl.debug_barrier()
    last = before == parts - 1
    if last:
        least = tl.full((BLOCK_N,), float("inf"), tl.float64)
        code = tl.full((BLOCK_N,), -1, tl.int32)
        other = parts * 0
        while other < parts:
            # From the second-level cache: the first belongs to one multiprocessor.
            value = tl.load(value_ptr + places + other * BLOCK_N, cache_modifier=".cg")
            found = tl.load(part_code_ptr + places + other * BLOCK_N, cache_modifier=".cg")
            nearer = value < least
            code = tl.where(nearer, found, code)
            least = tl.where(nearer, value, least)
            other += 1
    return last, code


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
    value_ptr,  # float64 [G, programs, BLOCK_N]: workspace
    part_code_ptr,  # int32 [G, programs, BLOCK_N]: workspace
    arrived_ptr,  # int32 [G, programs], zero before: parts of a tile that are done
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

    The number of rows is read on the device. Few tiles of rows share the codebook out between
    programs, so that the whole device is busy; many are strided over. Neither changes a result: the
    least exact value wins, and of equal ones the lowest id.
    """
    group = tl.program_id(1).to(tl.int64)
    programs = tl.num_programs(0)
    count = tl.load(count_ptr + group)
    tiles = (count + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    wanted = tl.minimum(programs // tl.maximum(tiles, 1), blocks)
    stretch = (blocks + tl.maximum(wanted, 1) - 1) // tl.maximum(wanted, 1)
    parts = (blocks + stretch - 1) // stretch
    table_ptr += group * K * D
    codebook_ptr += group * K * D
    bias_ptr += group * K
    scale_ptr += group * K
    shift_ptr += group * D
    value_ptr += group * programs * BLOCK_N
    part_code_ptr += group * programs * BLOCK_N
    arrived_ptr += group * programs
    item = tl.program_id(0)
    while item < tiles * parts:
        tile = item // parts
        part = item - tile * parts
        places = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_ok = places < count
        rows = tl.load(list_ptr + group * N + places, mask=row_ok, other=0)
        threshold = tl.load(threshold_ptr + group * N + places, mask=row_ok, other=0.0)
        x_rows = x_ptr + (group * stride_g + rows * stride_n)[:, None]
        valid = row_ok
        # A row that is not finite has a bound that is not, and so has its threshold.
        doubtful = row_ok & ~(threshold > float("-inf"))
        if tl.max(doubtful.to(tl.int32), 0) > 0:
            valid = finite_rows(x_rows, row_ok, D, BLOCK_D)
        least, code = _best_of_stretch(
            x_rows,
            valid,
            threshold,
            codebook_ptr,
            table_ptr,
            bias_ptr,
            scale_ptr,
            shift_ptr,
            part * stretch * BLOCK_K,
            tl.minimum((part + 1) * stretch * BLOCK_K, K),
            K,
            D,
            METRIC,
            ROUND,
            SHIFT,
            SCALED,
            BLOCK_K,
            BLOCK_D,
            EXACT_D,
        )
        done = parts == 1
        if parts > 1:
            done, code = _merged_parts(
                value_ptr, part_code_ptr, arrived_ptr, tile, parts, part, least, code
            )
        if done:
            tl.store(code_ptr + group * N + rows, code.to(tl.int64), mask=row_ok)
        item += programs


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
