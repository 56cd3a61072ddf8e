"""Triton backend of slot_attention: one program per row, key head and stretch of positions.

Stretches are cut at fixed positions, whatever the batch and the longest row, and joined in order:
a row's result depends on its own positions alone, bit for bit. Programs whose stretch a row does
not reach leave at once, so the cost follows the positions that are really there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Config:
    """Positions of a stretch and of one turn of its loop, with warps and pipeline stages."""

    stretch: int
    block_l: int
    num_warps: int
    num_stages: int


# A dtype has one stretch: another would join in another order, and bits would depend on the shape.
CONFIGS = {
    torch.float32: Config(256, 32, 4, 2),
    torch.bfloat16: Config(256, 64, 4, 3),
    torch.float16: Config(256, 64, 4, 3),
}
# The matrix units take no fewer rows.
LEAST_QUERIES = 16


@triton.jit
def _slot_attention_stretch_kernel(
    query_ptr,  # [N, Hq, D]
    keys_ptr,  # [S, Hk, D], strides below
    values_ptr,  # [S, Hk, E]
    runs_ptr,  # int64 [N, 5]: begin, end, shared_at, shared, own_at
    top_ptr,  # float32 [N, Hq, S], the largest score; -inf where nothing is visible
    mass_ptr,  # float32 [N, Hq, S], sum of exp(score - top)
    sum_ptr,  # float32 [N, Hq, S, E], the same times values
    scale,
    positions,
    longest,
    key_position,
    key_head,
    value_position,
    value_head,
    stretches,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STRETCH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    stretch = tl.program_id(2)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    first_query = (row * tl.num_programs(1) + head) * GROUP
    out = (first_query + g) * stretches + stretch

    start = stretch * STRETCH
    run = runs_ptr + row * 5
    begin = tl.maximum(tl.load(run), start)
    end = tl.minimum(tl.minimum(tl.load(run + 1), longest), start + STRETCH)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_G,), tl.float32)
    total = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    if begin < end:
        query = tl.load(
            query_ptr + (first_query + g)[:, None] * D + d[None, :],
            mask=(g < GROUP)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        shared_at = tl.load(run + 2)
        shared = tl.load(run + 3)
        own_at = tl.load(run + 4)
        key_base = keys_ptr + head * key_head
        value_base = values_ptr + head * value_head
        for offset in range(0, STRETCH, BLOCK_L):
            position = start + offset + tl.arange(0, BLOCK_L).to(tl.int64)
            seen = (position >= begin) & (position < end)
            at = position + tl.where(position < shared, shared_at, own_at - shared)
            # Nothing may be read outside the storage, whatever the runs say.
            at = tl.minimum(tl.maximum(at, 0), positions - 1)
            key = tl.load(
                key_base + at[None, :] * key_position + d[:, None],
                mask=seen[None, :] & (d < D)[:, None],
                other=0.0,
            )
            score = tl.dot(query, key, input_precision="ieee") * scale
            score = tl.where(seen[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            # Before anything is visible both are -inf, whose difference is NaN.
            safe_top = tl.where(new_top > float("-inf"), new_top, 0.0)
            weight = tl.exp(score - safe_top[:, None])
            shrink = tl.exp(top - safe_top)
            value = tl.load(
                value_base + at[:, None] * value_position + e[None, :],
                mask=seen[:, None] & (e < E)[None, :],
                other=0.0,
            )
            mass = mass * shrink + tl.sum(weight, 1)
            total = total * shrink[:, None]
            total = tl.dot(weight.to(value.dtype), value, total, input_precision="ieee")
            top = new_top
        tl.store(
            sum_ptr + out[:, None] * E + e[None, :],
            total,
            mask=(g < GROUP)[:, None] & (e < E)[None, :],
        )
    tl.store(top_ptr + out, top, mask=g < GROUP)
    tl.store(mass_ptr + out, mass, mask=g < GROUP)


@triton.jit
def _slot_attention_join_kernel(
    top_ptr,  # float32 [N, Hq, S]
    mass_ptr,  # float32 [N, Hq, S]
    sum_ptr,  # float32 [N, Hq, S, E], undefined where the mass is 0
    out_ptr,  # [N, Hq, E]
    stretches,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    top_ptr += query * stretches
    mass_ptr += query * stretches
    sum_ptr += query * stretches * E
    # No branch in either loop: the loads of several turns are under way at once.
    top = tl.full((), float("-inf"), tl.float32)
    for stretch in tl.range(STRETCHES, loop_unroll_factor=8):
        top = tl.maximum(top, tl.load(top_ptr + stretch))
    mass = tl.full((), 0.0, tl.float32)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for stretch in tl.range(STRETCHES, loop_unroll_factor=8):
        here = tl.load(top_ptr + stretch)
        seen = here > float("-inf")
        weight = tl.where(seen, tl.exp(here - tl.where(seen, top, 0.0)), 0.0)
        wanted = e < tl.where(seen, E, 0)
        part = tl.load(sum_ptr + stretch * E + e, mask=wanted, other=0.0)
        mass += tl.load(mass_ptr + stretch) * weight
        total += part * weight
    mean = tl.where(mass > 0.0, total / tl.where(mass > 0.0, mass, 1.0), 0.0)
    tl.store(out_ptr + query * E + e, mean.to(out_ptr.dtype.element_ty), mask=e < E)


def slot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    runs: Tensor,
    longest: int,
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """Contract and arguments as the reference, without float64; no host synchronisation.

    ``config`` replaces the dtype's own: another stretch joins in another order.
    """
    dtype = query.dtype
    if INTERPRETED and dtype == torch.bfloat16:
        # Triton 3.6's interpreter multiplies the bits of bfloat16 numbers as if they were integers.
        query, keys, values = query.float(), keys.float(), values.float()
    with torch.cuda.device_of(query):
        chosen = config or CONFIGS[query.dtype]
        stored = _heads(keys), _heads(values)
        out = _attend(query.contiguous(), *stored, runs, longest, scale, chosen)
    return out.to(dtype)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    runs: Tensor,
    longest: int,
    scale: float,
    config: Config,
) -> Tensor:
    """[N, Hq, E] in the query's dtype; launches on the current device."""
    rows, heads, dim = query.shape
    (positions, key_heads), width = keys.shape[:2], values.shape[2]
    out = torch.empty(rows, heads, width, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    stretches = triton.cdiv(longest, config.stretch)
    parts = (rows, heads, stretches)
    top = torch.empty(parts, dtype=torch.float32, device=query.device)
    mass, sums = torch.empty_like(top), top.new_empty(*parts, width)
    _slot_attention_stretch_kernel[(rows, key_heads, stretches)](
        query,
        keys,
        values,
        runs.contiguous(),
        top,
        mass,
        sums,
        scale,
        positions,
        longest,
        *keys.stride()[:2],
        *values.stride()[:2],
        stretches,
        GROUP=heads // key_heads,
        D=dim,
        E=width,
        BLOCK_G=max(LEAST_QUERIES, triton.next_power_of_2(heads // key_heads)),
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_E=max(16, triton.next_power_of_2(width)),
        BLOCK_L=config.block_l,
        STRETCH=config.stretch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _slot_attention_join_kernel[(rows * heads,)](
        top,
        mass,
        sums,
        out,
        stretches,
        E=width,
        BLOCK_E=max(16, triton.next_power_of_2(width)),
        STRETCHES=stretches,
        num_warps=1,
    )
    return out


def _heads(tensor: Tensor) -> Tensor:
    """The tensor itself when a head's numbers are contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
