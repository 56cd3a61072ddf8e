"""What the screen needs of a codebook: centred and rounded codes, and how far off they are."""

from __future__ import annotations

import triton
import triton.language as tl

# A bias this low marks a code that must not be chosen; no usable code's bias comes near it.
UNUSABLE = tl.constexpr(-3.0e38)
LOWEST_BIAS = tl.constexpr(-2.0e38)
# Places in `limits`: largest |v| of the exact and of the rounded codes, |v - v'|, |bias|, scale.
EXACT_LENGTH = tl.constexpr(0)
LENGTH = tl.constexpr(1)
LOST = tl.constexpr(2)
BIAS = tl.constexpr(3)
SCALE = tl.constexpr(4)
LIMITS = 8


@triton.jit
def round_to_tf32(value):
    """float32 with 10 bits of mantissa, halves away from zero: what no hardware rounds again.

    By the bits, so that the rounding is the same everywhere and its residual can be measured. NaN
    may come out as a number and large numbers as infinity; residuals and norms then tell.
    """
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _nearest_code_mean_kernel(
    codebook_ptr,  # [G, K, D]
    mean_ptr,  # float32 [G, D]
    K: tl.constexpr,
    D: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean of the finite values of SAMPLE codes spread over the codebook."""
    group = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Any vector is right; a sample's mean makes the codes as short as the whole mean does, nearly.
    codes = (tl.arange(0, SAMPLE).to(tl.int64) * K) // SAMPLE
    values = tl.load(
        codebook_ptr + (group * K + codes)[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0
    ).to(tl.float32)
    # Beyond 1e30 a sum could overflow, and centring would not help.
    kept = tl.abs(values) < 1e30
    mean = tl.sum(tl.where(kept, values, 0.0), 0) / SAMPLE
    tl.store(mean_ptr + group * D + d, mean, mask=d < D)


@triton.jit
def _nearest_code_prepare_kernel(
    codebook_ptr,  # [G, K, D]
    mean_ptr,  # float32 [G, D], read if CENTRE
    table_ptr,  # [G, K, D] out: codes to multiply with, in the codebook's dtype
    bias_ptr,  # float32 [G, K] out
    scale_ptr,  # float32 [G, K] out
    shift_ptr,  # float32 [G, D] out, if CENTRE: what was subtracted from the codes
    limits_ptr,  # float32 [G, LIMITS], zero before
    K: tl.constexpr,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    CENTRE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    code_ok = codes < K
    rows = (group * K + codes)[:, None] * D
    square = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
    first_square = tl.zeros((BLOCK_D,), tl.float64)
    mean_square = tl.zeros((BLOCK_D,), tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = code_ok[:, None] & (d < D)[None, :]
        code = tl.load(codebook_ptr + rows + d[None, :], mask=inside, other=0.0).to(tl.float64)
        square += code * code
        if CENTRE and METRIC == 1:
            first = tl.load(codebook_ptr + group * K * D + d, mask=d < D, other=0.0).to(tl.float64)
            mean = tl.load(mean_ptr + group * D + d, mask=d < D, other=0.0).to(tl.float64)
            first_square += first * first
            mean_square += mean * mean
    squares = tl.sum(square, 1)
    # float32 values have float64 squares below 2^256: only infinity and NaN reach this.
    usable = code_ok & (squares < float("inf"))
    inverse = tl.where((squares > 0.0) & usable, 1.0 / tl.sqrt(squares), 0.0)
    shrink = tl.full((), 1.0, tl.float64)
    if CENTRE and METRIC == 1:
        # Directions have a mean of length 1 at most. Divided by the larger of these two lengths the
        # mean is near it whether the codes agree in direction or not.
        reference = tl.sqrt(tl.maximum(tl.sum(first_square, 0), tl.sum(mean_square, 0)))
        good = (reference > 0.0) & (reference < float("inf"))
        shrink = tl.where(good, 1.0 / reference, 0.0)

    exact = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
    rounded = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
    lost = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = code_ok[:, None] & (d < D)[None, :]
        raw = tl.load(codebook_ptr + rows + d[None, :], mask=inside, other=0.0)
        code = raw.to(tl.float64)
        if CENTRE:
            if METRIC == 1:
                code = code * inverse[:, None]
            mean = tl.load(mean_ptr + group * D + d, mask=d < D, other=0.0).to(tl.float64)
            shift = (mean * shrink).to(tl.float32)
            tl.store(shift_ptr + group * D + d, shift, mask=d < D)
            code = code - shift.to(tl.float64)[None, :]
            kept = round_to_tf32(code.to(tl.float32))
        else:
            kept = raw
        kept = tl.where(usable[:, None] & (d < D)[None, :], kept, 0.0)
        if CENTRE:
            code = tl.where(usable[:, None] & (d < D)[None, :], code, 0.0)
            wide = kept.to(tl.float64)
            exact += code * code
            rounded += wide * wide
            lost += (code - wide) * (code - wide)
        tl.store(table_ptr + rows + d[None, :], kept.to(raw.dtype), mask=inside)

    scale = tl.full((BLOCK_K,), 1.0, tl.float64)
    if METRIC == 1 and not CENTRE:
        scale = inverse
    # Codes that are multiplied as they are lose nothing.
    exact_square = tl.where(usable, squares, 0.0)
    rounded_square = exact_square
    lost_square = tl.zeros((BLOCK_K,), tl.float64)
    if CENTRE:
        exact_square = tl.sum(exact, 1)
        rounded_square = tl.sum(rounded, 1)
        lost_square = tl.sum(lost, 1)
    bias = tl.zeros((BLOCK_K,), tl.float64)
    if METRIC == 0:
        bias = tl.maximum(-0.5 * exact_square, LOWEST_BIAS)
    stored = tl.where(usable, bias, UNUSABLE).to(tl.float32)
    tl.store(bias_ptr + group * K + codes, stored, mask=code_ok)
    tl.store(scale_ptr + group * K + codes, scale.to(tl.float32), mask=code_ok)
    # Largest values: their order does not matter to a maximum, so atomics keep it repeatable.
    limits = limits_ptr + group * 8
    tl.atomic_max(limits + EXACT_LENGTH, _largest(tl.sqrt(exact_square) * scale))
    tl.atomic_max(limits + LENGTH, _largest(tl.sqrt(rounded_square) * scale))
    tl.atomic_max(limits + LOST, _largest(tl.sqrt(lost_square) * scale))
    tl.atomic_max(limits + BIAS, _largest(-bias))
    tl.atomic_max(limits + SCALE, _largest(scale))


@triton.jit
def _largest(values):
    """Maximum as float32, from above."""
    return (tl.max(values, 0) * 1.000001).to(tl.float32)
