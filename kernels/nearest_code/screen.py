"""The screen: best score, its code and the runner-up of every row, on matrix units.

README.md proves the bound that tells which rows it decides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from latent_rl.kernels.nearest_code.prepare import (
    BIAS,
    EXACT_LENGTH,
    LENGTH,
    LOST,
    SCALE,
    UNUSABLE,
    round_to_tf32,
)

# Scores below this belong to codes that must not be chosen.
WORST = tl.constexpr(-2.5e38)


@triton.jit
def screen_operand(x_rows, shift_ptr, d, row_ok, D, ROUND: tl.constexpr, SHIFT: tl.constexpr):
    """A slice of rows to multiply with, its squares, and the squares of what rounding lost."""
    x = tl.load(x_rows + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    if ROUND:
        if SHIFT:
            # Zero where d >= D, so that masked columns stay zero.
            x = x - tl.load(shift_ptr + d, mask=d < D, other=0.0)[None, :]
        kept = round_to_tf32(x)
        residual = x - kept
        square = kept * kept
        lost = residual * residual
    else:
        kept = x
        square = x.to(tl.float32) * x.to(tl.float32)
        lost = tl.zeros_like(square)
    return kept, square, lost


@triton.jit
def code_tile(table_ptr, codes, d, K, D):
    """Codes as the right operand, [BLOCK_D, BLOCK_K]."""
    return tl.load(
        table_ptr + codes.to(tl.int64)[None, :] * D + d[:, None],
        mask=(codes < K)[None, :] & (d < D)[:, None],
        other=0.0,
    )


@triton.jit
def add_product(total, left, right):
    """total + left @ right, the sum rounded to nearest by the ordinary units.

    As a multiplication by one: Triton would merge an addition into the matrix unit's accumulator,
    whose additions truncate, and the error would grow with the whole width.
    """
    product = tl.dot(left, right, input_precision="tf32")
    return tl.fma(product, tl.full(product.shape, 1.0, tl.float32), total)


@triton.jit
def scores_of(product, bias_ptr, scale_ptr, codes, K, SCALED: tl.constexpr):
    """Products to scores; padding and unusable codes score UNUSABLE."""
    bias = tl.load(bias_ptr + codes, mask=codes < K, other=UNUSABLE)
    if SCALED:
        scale = tl.load(scale_ptr + codes, mask=codes < K, other=0.0)
        score = product * scale[None, :] + bias[None, :]
    else:
        score = product + bias[None, :]
    return score


@triton.jit
def score_error(limits_ptr, square, lost, accumulation, underflow, slack):
    """Bound E [rows] on the error of every score of a row; inf or NaN where there is none."""
    length = tl.sqrt(square)
    # The second term is the rounding of x - shift.
    lost = tl.sqrt(lost) + 2.4e-7 * length
    reach = tl.load(limits_ptr + LENGTH)
    error = lost * tl.load(limits_ptr + EXACT_LENGTH) + length * tl.load(limits_ptr + LOST)
    error += accumulation * (length * reach + tl.load(limits_ptr + BIAS))
    error += underflow * (1.0 + length + reach) * (1.0 + tl.load(limits_ptr + SCALE))
    return error * slack


@triton.jit
def append_rows(list_ptr, threshold_ptr, count_ptr, rows, threshold, keep):
    """Append the rows to keep to a list; in which order programs come changes no row's result."""
    place = tl.atomic_add(count_ptr + tl.zeros_like(rows), 1, mask=keep).to(tl.int64)
    tl.store(list_ptr + place, rows, mask=keep)
    tl.store(threshold_ptr + place, threshold, mask=keep)


@triton.jit
def decide(code_ptr, list_ptr, threshold_ptr, count_ptr, rows, row_ok, best, second, code, error):
    """Store codes of decided rows and list the others with the score a candidate must reach."""
    # NaN (from overflow) compares false: what is tested is certainty, not doubt.
    certain = (best > WORST) & (best - second > 2.0 * error)
    tl.store(code_ptr + rows, code.to(tl.int64), mask=row_ok & certain)
    threshold = best - 2.0 * error
    append_rows(list_ptr, threshold_ptr, count_ptr, rows, threshold, row_ok & ~certain)


@triton.jit(do_not_specialize=["N"])
def _nearest_code_screen_kernel(
    x_ptr,  # [G, N, D], rows contiguous
    table_ptr,  # [G, K, D] codes as prepared
    bias_ptr,  # float32 [G, K]
    scale_ptr,  # float32 [G, K]
    shift_ptr,  # float32 [G, D]
    limits_ptr,  # float32 [G, 8]
    code_ptr,  # int64 [G, N] out, of decided rows
    list_ptr,  # int64 [G, N] out: undecided rows
    threshold_ptr,  # float32 [G, N] out: what their candidates must score
    count_ptr,  # int32 [G], zero before: how many
    part_best_ptr,  # float32 [SPLITS, G, N] out, and the next two, if SPLITS > 1
    part_second_ptr,
    part_code_ptr,  # int32
    error_ptr,  # float32 [G, N] out, if SPLITS > 1
    N,
    stride_g,
    stride_n,
    accumulation,
    underflow,
    slack,
    # Fixed by the model, unlike N: as constants they cost one compile per codebook.
    K: tl.constexpr,
    D: tl.constexpr,
    ROUND: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    x_rows = x_ptr + (group * stride_g + rows * stride_n)[:, None]
    table_ptr += group * K * D
    bias_ptr += group * K
    scale_ptr += group * K
    shift_ptr += group * D
    best = tl.full((BLOCK_N,), UNUSABLE, tl.float32)
    second = tl.full((BLOCK_N,), UNUSABLE, tl.float32)
    code = tl.zeros((BLOCK_N,), tl.int32)
    lanes = tl.arange(0, BLOCK_D)
    RESIDENT: tl.constexpr = D <= BLOCK_D
    # Squares lane by lane need no shuffles but registers, which only a single tile has to spare.
    LANEWISE: tl.constexpr = SPLIT_K <= BLOCK_K and BLOCK_N <= 64
    if RESIDENT:
        left, square, lost = screen_operand(x_rows, shift_ptr, lanes, row_ok, D, ROUND, SHIFT)
        squares, losses = tl.sum(square, 1), tl.zeros((BLOCK_N,), tl.float32)
        if ROUND:
            losses = tl.sum(lost, 1)
    elif LANEWISE:
        squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        losses = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        squares = tl.zeros((BLOCK_N,), tl.float32)
        losses = tl.zeros((BLOCK_N,), tl.float32)

    for start in range(0, SPLIT_K, BLOCK_K):
        codes = split * SPLIT_K + start + tl.arange(0, BLOCK_K)
        if RESIDENT:
            right = code_tile(table_ptr, codes, lanes, K, D)
            product = tl.dot(left, right, input_precision="tf32")
        else:
            product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for start_d in range(0, D, BLOCK_D):
                d = start_d + lanes
                left, square, lost = screen_operand(x_rows, shift_ptr, d, row_ok, D, ROUND, SHIFT)
                if LANEWISE:
                    squares += square
                    losses += lost
                elif start == 0:
                    squares += tl.sum(square, 1)
                    if ROUND:
                        losses += tl.sum(lost, 1)
                product = add_product(product, left, code_tile(table_ptr, codes, d, K, D))
        score = scores_of(product, bias_ptr, scale_ptr, codes, K, SCALED)
        # A score gives its last bits to its column: keys of a row differ, and a plain maximum finds
        # both the best score and its code.
        bits = score.to(tl.int32, bitcast=True) & -BLOCK_K
        key = (bits | tl.arange(0, BLOCK_K)[None, :]).to(tl.float32, bitcast=True)
        top = tl.max(key, 1)
        runner_up = tl.max(tl.where(key == top[:, None], UNUSABLE, key), 1)
        second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(best, top))
        column = top.to(tl.int32, bitcast=True) & (BLOCK_K - 1)
        code = tl.where(top > best, split * SPLIT_K + start + column, code)
        best = tl.maximum(best, top)

    if LANEWISE and not RESIDENT:
        squares = tl.sum(squares, 1)
        losses = tl.sum(losses, 1) if ROUND else tl.zeros((BLOCK_N,), tl.float32)
    error = score_error(
        limits_ptr + group * 8,
        squares,
        losses,
        accumulation,
        underflow,
        slack,
    )
    if SPLITS == 1:
        decide(
            code_ptr + group * N,
            list_ptr + group * N,
            threshold_ptr + group * N,
            count_ptr + group,
            rows,
            row_ok,
            best,
            second,
            code,
            error,
        )
    else:
        place = group * N + rows
        part = split.to(tl.int64) * tl.num_programs(1) * N + place
        tl.store(part_best_ptr + part, best, mask=row_ok)
        tl.store(part_second_ptr + part, second, mask=row_ok)
        tl.store(part_code_ptr + part, code, mask=row_ok)
        tl.store(error_ptr + place, error, mask=row_ok & (split == 0))


@triton.jit(do_not_specialize=["N"])
def _nearest_code_merge_kernel(
    code_ptr,
    list_ptr,
    threshold_ptr,
    count_ptr,
    part_best_ptr,
    part_second_ptr,
    part_code_ptr,
    error_ptr,
    N,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Decide rows whose codebook was split over programs; arguments as the screen's."""
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    best = tl.full((BLOCK_N,), UNUSABLE, tl.float32)
    second = tl.full((BLOCK_N,), UNUSABLE, tl.float32)
    code = tl.zeros((BLOCK_N,), tl.int32)
    for split in range(SPLITS):
        part = (split * tl.num_programs(1) + group) * N + rows
        top = tl.load(part_best_ptr + part, mask=row_ok, other=UNUSABLE)
        runner_up = tl.load(part_second_ptr + part, mask=row_ok, other=UNUSABLE)
        top_code = tl.load(part_code_ptr + part, mask=row_ok, other=0)
        second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(best, top))
        code = tl.where(top > best, top_code, code)
        best = tl.maximum(best, top)
    decide(
        code_ptr + group * N,
        list_ptr + group * N,
        threshold_ptr + group * N,
        count_ptr + group,
        rows,
        row_ok,
        best,
        second,
        code,
        tl.load(error_ptr + group * N + rows, mask=row_ok, other=0.0),
    )
