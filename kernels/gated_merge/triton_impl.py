"""Triton forward of gated_merge: both wide products, the code's tables and the gate in one kernel.

A program holds a tile of both pre-activations in registers. Its epilogue adds the table rows of the
tile's codes and forms the activation, so that the products are never written unfinished and read
again. README.md weighs this against cuBLAS with an epilogue kernel.
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
    """Tile of both products: rows, columns of I, a step of H; warps and pipeline stages."""

    block_n: int
    block_i: int
    block_h: int
    num_warps: int
    num_stages: int


_ANY = 1 << 62
# Per compute capability: (largest N served, configuration). Two accumulators share the registers,
# so 128 x 128 here is what 128 x 256 is to one product. Few rows are bound by the weights' bytes
# and want many narrow tiles.
CONFIGS = {
    80: ((64, Config(64, 32, 64, 4, 4)), (_ANY, Config(128, 64, 64, 8, 3))),
    90: ((64, Config(64, 32, 128, 4, 4)), (_ANY, Config(128, 128, 64, 8, 4))),
    100: ((64, Config(64, 32, 128, 4, 4)), (_ANY, Config(128, 128, 64, 8, 4))),
}
# Tiles of rows that take turns on the same weights, which then come from L2.
GROUP_N = 8


@triton.jit
def _gated_merge_fwd_kernel(
    e_ptr,  # [N, H]
    w_gate_ptr,  # [I, H + D], of which H columns are read
    w_up_ptr,  # [I, H + D]
    table_gate_ptr,  # float32 [K, I]
    table_up_ptr,  # float32 [K, I]
    code_ptr,  # int64 [N]
    pre_gate_ptr,  # [N, I]
    pre_up_ptr,  # [N, I]
    activation_ptr,  # [N, I]
    N,
    e_stride,
    w_stride,  # of both weights
    # Fixed by the model, unlike N: as constants they cost one compile per model.
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    KEEP: tl.constexpr,  # store the pre-activations, which only a backward reads
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_i: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    program = tl.program_id(0)
    group = program // (GROUP * tiles_i)
    in_group = tl.minimum(tiles_n - group * GROUP, GROUP)
    within = program - group * GROUP * tiles_i
    tile_n = group * GROUP + within % in_group
    tile_i = within // in_group
    # Tiles begin at 64-bit offsets; within a tile 32 bits do, and half the registers.
    first_row = tile_n.to(tl.int64) * BLOCK_N
    first_column = tile_i.to(tl.int64) * BLOCK_I
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_I)
    # Rows and columns past the end repeat the last: no mask in the loop, none of it is stored.
    last_row = (N - 1 - first_row).to(tl.int32)
    last_column = (I - 1 - first_column).to(tl.int32)
    read_rows = tl.minimum(rows, last_row)
    read_columns = tl.minimum(columns, last_column)
    steps = tl.arange(0, BLOCK_H)
    e_at = e_ptr + first_row * e_stride + read_rows[:, None] * e_stride + steps[None, :]
    weight_at = read_columns[None, :] * w_stride + steps[:, None]
    gate_at = w_gate_ptr + first_column * w_stride + weight_at
    up_at = w_up_ptr + first_column * w_stride + weight_at
    # The tables' rows first, while the registers are still empty: after the products they are full.
    code = tl.load(code_ptr + first_row + read_rows)
    entry = tl.where((code >= 0) & (code < K), code, 0)
    if K * I < 1 << 31:
        entry = entry.to(tl.int32)
    entry = entry[:, None] * I + read_columns[None, :]
    gate = tl.load(table_gate_ptr + first_column + entry)
    up = tl.load(table_up_ptr + first_column + entry)
    for start in range(0, H, BLOCK_H):
        if H % BLOCK_H == 0:
            e = tl.load(e_at + start)
            w_gate = tl.load(gate_at + start)
            w_up = tl.load(up_at + start)
        else:
            inside = start + steps < H
            e = tl.load(e_at + start, mask=inside[None, :], other=0.0)
            w_gate = tl.load(gate_at + start, mask=inside[:, None], other=0.0)
            w_up = tl.load(up_at + start, mask=inside[:, None], other=0.0)
        gate = tl.dot(e, w_gate, gate, input_precision="ieee")
        up = tl.dot(e, w_up, up, input_precision="ieee")

    stored = (rows <= last_row)[:, None] & (columns <= last_column)[None, :]
    first = first_row * I + first_column
    at = rows[:, None] * I + columns[None, :]
    dtype = activation_ptr.dtype.element_ty
    if KEEP:
        tl.store(pre_gate_ptr + first + at, gate.to(dtype), mask=stored)
        tl.store(pre_up_ptr + first + at, up.to(dtype), mask=stored)
    # Read again rather than kept through the loop, whose registers are full.
    code = tl.load(code_ptr + first_row + read_rows)
    valid = (code >= 0) & (code < K)
    activation = gate / (1.0 + tl.exp(-gate)) * up
    activation = tl.where(valid[:, None], activation, float("nan"))
    tl.store(activation_ptr + first + at, activation.to(dtype), mask=stored)


def gated_merge_forward(
    e: Tensor,
    codes: Tensor,
    codebook: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge block; contract and arguments as the reference, for bfloat16 and float16.

    A row's pre-activations do not depend on its batch: every configuration adds up H in the order
    of the matrix unit, and no product is split along it. ``config`` replaces the table's choice.
    """
    if INTERPRETED and e.dtype == torch.bfloat16:
        # Triton 3.6's interpreter multiplies the bits of bfloat16 numbers as if they were integers.
        wide = (t.float() for t in (e, codebook, w_gate, w_up, w_down))
        out = _forward(*wide, codes, config)
        return out[0].bfloat16(), out[1].bfloat16(), out[2].bfloat16()
    return _forward(e, codebook, w_gate, w_up, w_down, codes, config)


def gated_merge_step(
    e: Tensor,
    codes: Tensor,
    tables: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    config: Config | None = None,
) -> Tensor:
    """The block's output alone, from tables [2, K, I] float32 made before; see the reference.

    ``config`` replaces the table's choice.
    """
    if INTERPRETED and e.dtype == torch.bfloat16:
        wide = (t.float() for t in (e, w_gate, w_up, w_down))
        return _step(*wide, tables, codes, config).bfloat16()
    return _step(e, w_gate, w_up, w_down, tables, codes, config)


def _forward(
    e: Tensor,
    codebook: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    codes: Tensor,
    config: Config | None,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, shape = e.shape[1], (e.shape[0], w_gate.shape[0])
    pre_gate, pre_up = (torch.empty(shape, dtype=e.dtype, device=e.device) for _ in range(2))
    tables = _table(codebook, w_gate[:, hidden:]), _table(codebook, w_up[:, hidden:])
    activation = _activation(e, w_gate, w_up, tables, codes, (pre_gate, pre_up), config)
    return torch.mm(activation, w_down.T), pre_gate, pre_up


def _step(
    e: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    tables: Tensor,
    codes: Tensor,
    config: Config | None,
) -> Tensor:
    activation = _activation(e, w_gate, w_up, (tables[0], tables[1]), codes, None, config)
    return torch.mm(activation, w_down.T)


def _activation(
    e: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    tables: tuple[Tensor, Tensor],
    codes: Tensor,
    kept: tuple[Tensor, Tensor] | None,
    config: Config | None,
) -> Tensor:
    """silu(gate) * up, [N, I]; the pre-activations go to ``kept`` where it is given."""
    e, w_gate, w_up = (_rows_of(t) for t in (e, w_gate, w_up))
    if w_gate.stride(0) != w_up.stride(0):
        w_gate, w_up = w_gate.contiguous(), w_up.contiguous()
    (n, hidden), inner = e.shape, w_gate.shape[0]
    activation = torch.empty((n, inner), dtype=e.dtype, device=e.device)
    if n == 0:
        return activation
    config = config or config_for(n, e.device)
    grid = (triton.cdiv(n, config.block_n) * triton.cdiv(inner, config.block_i),)
    pre_gate, pre_up = (activation, activation) if kept is None else kept
    with torch.cuda.device(e.device if e.is_cuda else -1):
        _gated_merge_fwd_kernel[grid](
            e,
            w_gate,
            w_up,
            tables[0],
            tables[1],
            codes.contiguous(),
            pre_gate,
            pre_up,
            activation,
            n,
            e.stride(0),
            w_gate.stride(0),
            K=tables[0].shape[0],
            H=hidden,
            I=inner,
            BLOCK_N=config.block_n,
            BLOCK_I=config.block_i,
            BLOCK_H=config.block_h,
            GROUP=GROUP_N,
            KEEP=kept is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return activation


def config_for(n: int, device: torch.device) -> Config:
    """The configuration of the newest capability in the table that the device has."""
    found = 90
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = major * 10 + minor
    newest = max((c for c in CONFIGS if c <= found), default=min(CONFIGS))
    return next(config for largest, config in CONFIGS[newest] if n <= largest)


def _rows_of(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _table(codebook: Tensor, weight: Tensor) -> Tensor:
    """codebook W^T, float32 [K, I]: K rows alone, so unrounded they cost nothing."""
    if codebook.is_cuda and codebook.dtype != torch.float32:
        return torch.mm(codebook, weight.T, out_dtype=torch.float32)
    return torch.mm(codebook.float(), weight.T.float())
