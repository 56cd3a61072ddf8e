"""Triton backend of nearest_code: a float32 screen with a bound, then an exact search where needed.

The screen streams the codebook past a tile of rows and keeps, per row, the best score, its code and
the runner-up's score. Where the two lie within twice the error bound of the screen the row is
searched again in float64; all other rows are decided. README.md proves the bound.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_METRICS = {"l2": 0, "cosine": 1, "dot": 2}


@dataclass(frozen=True)
class Config:
    """Tile sizes of the screen: rows, codes and width, with warps and pipeline stages."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


# (largest N served, configuration); few rows want small tiles so that every SM has one.
_ANY = 1 << 62
CONFIGS = {
    # Without matrix units the product is bound by shared memory, and wide tiles would exceed it.
    torch.float32: ((_ANY, Config(64, 64, 32, 4, 2)),),
    torch.bfloat16: ((16384, Config(64, 64, 64, 4, 3)), (_ANY, Config(128, 128, 64, 8, 3))),
    torch.float16: ((16384, Config(64, 64, 64, 4, 3)), (_ANY, Config(128, 128, 64, 8, 3))),
}
# Width of a step of the exact search; a block of codes times it sits in registers as float64.
EXACT_BLOCK_K, EXACT_BLOCK_D = 16, 64


@triton.jit
def _nearest_code_screen_kernel(
    x_ptr,  # [G, N, D]
    codebook_ptr,  # [G, K, D], rows that are not finite zeroed
    offset_ptr,  # float32 [G, K], subtracted from the scores; +inf for unusable codes
    reach_ptr,  # float32 [G], the largest finite |c| of the group
    code_ptr,  # int64 [G, N]
    ambiguous_ptr,  # int8 [G, N]
    N,
    error_unit,  # relative error of a score: (D + 8) 2^-22
    # Fixed by the model, unlike N: as constants they cost one compile per codebook.
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    x_rows = x_ptr + (group * N + rows)[:, None] * D
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    second = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    code = tl.zeros((BLOCK_N,), tl.int64)
    square = tl.zeros((BLOCK_N,), tl.float32)
    broken = tl.zeros((BLOCK_N,), tl.int32)

    for start_k in range(0, K, BLOCK_K):
        codes = start_k + tl.arange(0, BLOCK_K)
        code_ok = codes < K
        c_rows = codebook_ptr + (group * K + codes).to(tl.int64)[None, :] * D
        score = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start_d in range(0, D, BLOCK_D):
            d = start_d + tl.arange(0, BLOCK_D)
            d_ok = d < D
            x = tl.load(x_rows + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0)
            c = tl.load(c_rows + d[:, None], mask=code_ok[None, :] & d_ok[:, None], other=0.0)
            wide = x.to(tl.float32)
            # inf - inf and nan - nan are not 0: the one test that catches both.
            finite = (wide - wide) == 0.0
            x = tl.where(finite, wide, 0.0).to(x.dtype)
            if start_k == 0:
                broken += tl.sum((~finite).to(tl.int32), 1)
                clean = tl.where(finite, wide, 0.0)
                square += tl.sum(clean * clean, 1)
            score = tl.dot(x, c, score, input_precision="ieee")
        offset = tl.load(offset_ptr + group * K + codes, mask=code_ok, other=float("inf"))
        score = score - offset[None, :]
        # argmax takes the first of equals, and a later block wins only when strictly better: the
        # lowest id wins a tie.
        here = tl.argmax(score, 1, tie_break_left=True)
        top = tl.max(score, 1)
        is_top = tl.arange(0, BLOCK_K)[None, :] == here[:, None]
        runner_up = tl.max(tl.where(is_top, float("-inf"), score), 1)
        second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(best, top))
        code = tl.where(top > best, start_k + here.to(tl.int64), code)
        best = tl.maximum(best, top)

    reach = tl.load(reach_ptr + group)
    length = tl.sqrt(square)
    # Times error_unit, 2^-103 is what steps below the normal range may lose (README.md).
    underflow = 9.8607613152626476e-32 * (1.0 + length + reach)
    bound = error_unit * (length * reach + reach * reach + underflow)
    # NaN (from overflow) compares false, so the test is for certainty, not for doubt.
    certain = best - second > 2.0 * bound
    usable = (broken == 0) & (best > float("-inf"))
    # Scores that overflowed may have lost every code; only the exact search can tell.
    overflowed = (broken == 0) & ~(best < float("inf"))
    tl.store(code_ptr + group * N + rows, tl.where(usable, code, -1), mask=row_ok)
    again = (usable & ~certain) | overflowed | ((broken == 0) & (best == float("-inf")))
    tl.store(ambiguous_ptr + group * N + rows, again.to(tl.int8), mask=row_ok)


@triton.jit
def _exact_distance(x, c, METRIC: tl.constexpr):
    """Contribution of a slice to the three sums an exact distance needs, in float64."""
    if METRIC == 0:
        gap = x - c
        return gap * gap
    return x * c


@triton.jit
def _nearest_code_finish_kernel(
    x_ptr,  # [G, N, D]
    codebook_ptr,  # [G, K, D]
    offset_ptr,  # float32 [G, K]; +inf marks unusable codes
    code_ptr,  # int64 [G, N], read and written
    ambiguous_ptr,  # int8 [G, N]
    distance_ptr,  # float32 [G, N]
    N,
    K: tl.constexpr,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    row = group * N + tl.program_id(0).to(tl.int64)
    code = tl.load(code_ptr + row)

    if tl.load(ambiguous_ptr + row) != 0:
        best = tl.full((), float("inf"), tl.float64)
        code = tl.full((), -1, tl.int64)
        for start_k in range(0, K, BLOCK_K):
            codes = start_k + tl.arange(0, BLOCK_K)
            code_ok = codes < K
            offset = tl.load(offset_ptr + group * K + codes, mask=code_ok, other=float("inf"))
            c_rows = codebook_ptr + (group * K + codes).to(tl.int64)[:, None] * D
            total = tl.zeros((BLOCK_K,), tl.float64)
            length = tl.zeros((BLOCK_K,), tl.float64)
            for start_d in range(0, D, BLOCK_D):
                d = start_d + tl.arange(0, BLOCK_D)
                d_ok = d < D
                x = tl.load(x_ptr + row * D + d, mask=d_ok, other=0.0).to(tl.float64)
                c = tl.load(c_rows + d[None, :], mask=code_ok[:, None] & d_ok[None, :], other=0.0)
                c = c.to(tl.float64)
                total += tl.sum(_exact_distance(x[None, :], c, METRIC), 1)
                length += tl.sum(c * c, 1)
            if METRIC == 0:
                value = total
            elif METRIC == 1:
                value = tl.where(length > 0.0, -total / tl.sqrt(length), 0.0)
            else:
                value = -total
            value = tl.where(offset < float("inf"), value, float("inf"))
            here = tl.argmin(value, 0, tie_break_left=True)
            least = tl.min(value, 0)
            code = tl.where(least < best, start_k + here.to(tl.int64), code)
            best = tl.minimum(best, least)
        tl.store(code_ptr + row, code)

    # The distance of the code chosen, once more in float64: the screen's score has cancelled.
    chosen = codebook_ptr + (group * K + tl.maximum(code, 0)) * D
    total = tl.full((), 0.0, tl.float64)
    x_length = tl.full((), 0.0, tl.float64)
    c_length = tl.full((), 0.0, tl.float64)
    for start_d in range(0, D, BLOCK_D):
        d = start_d + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float64)
        c = tl.load(chosen + d, mask=d < D, other=0.0).to(tl.float64)
        total += tl.sum(_exact_distance(x, c, METRIC), 0)
        x_length += tl.sum(x * x, 0)
        c_length += tl.sum(c * c, 0)
    if METRIC == 0:
        distance = total
    elif METRIC == 1:
        scale = tl.sqrt(x_length) * tl.sqrt(c_length)
        distance = 1.0 - tl.where(scale > 0.0, total / scale, 0.0)
    else:
        distance = -total
    distance = tl.where(code >= 0, distance, float("nan"))
    tl.store(distance_ptr + row, distance.to(tl.float32))


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest code of every row; contract and arguments as the reference, without float64.

    No host synchronisation: rows in doubt are marked on the device and searched by the second
    kernel, whose programs leave at once for all others.
    """
    x, codebook = x.contiguous(), codebook.contiguous()
    if INTERPRETED and x.dtype == torch.bfloat16:
        # Triton 3.6's interpreter multiplies the bits of bfloat16 numbers as if they were integers.
        x, codebook = x.float(), codebook.float()
    groups, n, width = x.shape
    num_codes = codebook.shape[1]
    codes = torch.empty(groups, n, dtype=torch.int64, device=x.device)
    distance = torch.empty(groups, n, dtype=torch.float32, device=x.device)
    if codes.numel() == 0:
        return codes, distance
    screened, offset, reach = _prepare(codebook, metric)
    ambiguous = torch.empty(groups, n, dtype=torch.int8, device=x.device)
    config = next(config for largest, config in CONFIGS[x.dtype] if n <= largest)
    _nearest_code_screen_kernel[(triton.cdiv(n, config.block_n), groups)](
        x,
        screened,
        offset,
        reach,
        codes,
        ambiguous,
        n,
        error_unit(width),
        K=num_codes,
        D=width,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _nearest_code_finish_kernel[(n, groups)](
        x,
        codebook,
        offset,
        codes,
        ambiguous,
        distance,
        n,
        K=num_codes,
        D=width,
        METRIC=_METRICS[metric],
        BLOCK_K=EXACT_BLOCK_K,
        BLOCK_D=EXACT_BLOCK_D,
        num_warps=1,
    )
    return codes, distance


def error_unit(width: int) -> float:
    """Error of a screened score relative to |x| |c| + |c|^2; proof in README.md.

    2^-22 per accumulation step rather than 2^-24, since matrix units truncate where the standard
    rounds, and eight steps for the preparation of codes and offsets.
    """
    return (width + 8) * 2.0**-22


def _prepare(codebook: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes to score with, what to subtract from the scores, and the codes' largest length."""
    usable = codebook.isfinite().all(-1)
    clean = torch.where(usable[..., None], codebook, 0)
    lengths = clean.double().norm(dim=-1)
    if metric == "cosine":
        wide = clean.double() / lengths.clamp(min=torch.finfo(torch.float64).tiny)[..., None]
        # Scaled codes in the rows' own low precision would not be exact any more; the bound then
        # has to carry their rounding, which `reach` does below.
        clean = wide.to(codebook.dtype)
        rounding = 0.0 if codebook.dtype == torch.float32 else torch.finfo(codebook.dtype).eps
        reach = torch.full_like(lengths[:, 0], 1.0 + rounding / error_unit(codebook.shape[-1]))
        offset = torch.zeros_like(lengths)
    else:
        reach = lengths.amax(-1)
        offset = lengths.square() / 2 if metric == "l2" else torch.zeros_like(lengths)
    # Infinity means unusable; an offset beyond float32 belongs to a code that still is.
    largest = torch.finfo(torch.float32).max
    offset = offset.clamp(max=largest).masked_fill(~usable, torch.inf)
    return clean, offset.float(), reach.float()
