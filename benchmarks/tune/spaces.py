"""What can be tuned: per op its configurations, how to call it with one, and what is right.

Triton is imported by the functions, since whoever asks for the command's help need not have it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import gated_merge as merge_bench
from benchmarks.ops import nearest_code as search_bench
from benchmarks.ops import slot_attention as attention_bench
from benchmarks.registry import Call, Entry, Inputs, Pass, Shape
from benchmarks.tune.model import Chip, Work, cdiv

# Relative error of a 16-bit result against float32 products; an order of magnitude of room.
WRONG = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# More rows than this are a training pass, fewer a decoding step.
STEP_ROWS = 256


@dataclass(frozen=True)
class Tunable:
    """An op whose Triton kernel takes a configuration.

    Attributes:
        entry: its benchmark, for shapes and inputs.
        configs: every configuration worth a thought at a shape.
        work: what the model must know of one.
        present: the table's choice.
        make: the call under a configuration.
        truth: the right result of inputs.
        problem: what is wrong with a result, or None.
        kernels: the Triton functions whose registers are looked at.
    """

    entry: Entry
    configs: Callable[[Shape, torch.dtype], Iterator[Any]]
    work: Callable[[Any, Shape, torch.dtype], Work]
    present: Callable[[Shape, torch.dtype, torch.device], Any]
    make: Callable[[Inputs, Any], Call]
    truth: Callable[[Inputs], Tensor]
    problem: Callable[[Inputs, Any, Tensor], str | None]
    kernels: Callable[[], tuple[Any, ...]]


def far_off(inputs: Inputs, result: Tensor, truth: Tensor) -> str | None:
    error = ((result.double() - truth.double()).norm() / truth.double().norm()).item()
    limit = WRONG[result.dtype]
    return None if error <= limit else f"relative error {error:.2g} above {limit:g}"


# nearest_code: the screen, with the second search it leaves work to.


def search_configs(shape: Shape, dtype: torch.dtype) -> Iterator[Any]:
    from latent_rl.kernels.nearest_code.configs import Config

    most_d = max(16, 1 << (shape["D"] - 1).bit_length())
    most_k = max(16, 1 << (shape["K"] - 1).bit_length())
    widths = sorted({min(width, most_d) for width in (32, 64, 128, 256)})
    codes = sorted({min(size, most_k) for size in (32, 64, 128, 256)})
    for sizes in itertools.product((64, 128, 256), codes, widths, (4, 8), (2, 3, 4, 5)):
        yield Config(*sizes)


def search_work(config: Any, shape: Shape, dtype: torch.dtype) -> Work:
    from latent_rl.kernels.nearest_code.configs import splits_of

    n, width, size = (shape[s] for s in "NDK")
    block_n, block_k, block_d = config.block_n, config.block_k, config.block_d
    stages, resident = config.num_stages, width <= block_d
    splits = splits_of(config, 1, n, size, Chip().processors)
    tiles, code_tiles = cdiv(n, block_n), cdiv(size, block_k)
    rows_bytes, codes_bytes = n * width * dtype.itemsize, size * width * dtype.itemsize
    left, right = block_n * block_d * dtype.itemsize, block_k * block_d * dtype.itemsize
    padded_width = cdiv(width, block_d) * block_d
    return Work(
        programs=tiles * splits,
        flops=2.0 * tiles * block_n * code_tiles * block_k * padded_width,
        memory_bytes=rows_bytes + codes_bytes,
        # A row that stays on the chip is read once per split, another once per tile of codes.
        cache_bytes=(splits if resident else code_tiles) * rows_bytes + tiles * codes_bytes,
        # The product, and half as much again while its keys are searched.
        accumulators=block_n * block_k * 3 // 2,
        shared_bytes=left + stages * right if resident else stages * (left + right),
        loads_in_flight=stages,
        tile=(block_n, block_k),
        warps=config.num_warps,
    )


def search_present(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    from latent_rl.kernels.nearest_code.configs import choose, machine_of

    return choose(machine_of(device).architecture, dtype, shape["N"], shape["D"])


def search(inputs: Inputs, config: Any) -> Call:
    from latent_rl.kernels.nearest_code.triton_impl import nearest_codes

    x, codebook = inputs["x"][None], inputs["codebook"][None]
    return lambda: nearest_codes(x, codebook, "l2", config)[0]


def wrong_codes(inputs: Inputs, codes: Tensor, truth: Tensor) -> str | None:
    wrong = search_bench.wrong_rows(inputs, codes, truth)["wrong_rows"]
    return None if wrong == 0 else f"{wrong:g} wrong codes"


def search_kernels() -> tuple[Any, ...]:
    from latent_rl.kernels.nearest_code.screen import _nearest_code_screen_kernel

    return (_nearest_code_screen_kernel,)


# gated_merge: both wide products with the gate.


def merge_configs(shape: Shape, dtype: torch.dtype) -> Iterator[Any]:
    from latent_rl.kernels.gated_merge.triton_impl import Config

    most_n = max(16, 1 << (shape["N"] - 1).bit_length())
    rows = sorted({min(n, most_n) for n in (16, 32, 64, 128, 256)})
    sizes = itertools.product(rows, (16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4, 5))
    return (Config(*size) for size in sizes)


def merge_work(config: Any, shape: Shape, dtype: torch.dtype) -> Work:
    n, hidden, inner = shape["N"], shape["H"], shape["I"]
    block_n, block_i, stages = config.block_n, config.block_i, config.num_stages
    tiles_n, tiles_i = cdiv(n, block_n), cdiv(inner, block_i)
    e_bytes, w_bytes = n * hidden * dtype.itemsize, 2 * inner * hidden * dtype.itemsize
    return Work(
        programs=tiles_n * tiles_i,
        flops=4.0 * tiles_n * block_n * tiles_i * block_i * hidden,
        memory_bytes=e_bytes + w_bytes + 3 * n * inner * dtype.itemsize,
        cache_bytes=tiles_i * e_bytes + tiles_n * w_bytes,
        accumulators=2 * block_n * block_i,
        shared_bytes=stages * (block_n + 2 * block_i) * config.block_h * dtype.itemsize,
        loads_in_flight=stages,
        tile=(block_n, 2 * block_i),
        warps=config.num_warps,
    )


def merge_present(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    from latent_rl.kernels.gated_merge.triton_impl import config_for

    return config_for(shape["N"], device)


def merge(inputs: Inputs, config: Any) -> Call:
    """A decoding step with tables at hand for few rows, a forward that keeps for many."""
    from latent_rl.kernels.gated_merge import triton_impl

    from latent_rl import ops

    t = inputs
    weights = t["w_gate"], t["w_up"], t["w_down"]
    if len(t["e"]) <= STEP_ROWS:
        tables = ops.merge_tables(t["codebook"], t["w_gate"], t["w_up"])
        return lambda: triton_impl.gated_merge_step(t["e"], t["codes"], tables, *weights, config)
    return lambda: triton_impl.gated_merge_forward(
        t["e"], t["codes"], t["codebook"], *weights, config
    )[0]


def merge_truth(inputs: Inputs) -> Tensor:
    wide = {name: v.float() if v.is_floating_point() else v for name, v in inputs.items()}
    return merge_bench.concatenated(wide)[0]


def merge_kernels() -> tuple[Any, ...]:
    from latent_rl.kernels.gated_merge.triton_impl import _gated_merge_fwd_kernel

    return (_gated_merge_fwd_kernel,)


# slot_attention: a stretch of positions per program.


def attention_configs(shape: Shape, dtype: torch.dtype) -> Iterator[Any]:
    from latent_rl.kernels.slot_attention.triton_impl import Config

    turns = itertools.product((64, 128, 256, 512), (16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3, 4, 5))
    for stretch, block_l, warps, stages in turns:
        # A pipeline longer than the loop holds nothing.
        if stages * block_l <= max(stretch, block_l):
            yield Config(stretch, block_l, warps, stages)


def attention_work(config: Any, shape: Shape, dtype: torch.dtype) -> Work:
    from latent_rl.kernels.slot_attention.triton_impl import LEAST_QUERIES

    rows, length, heads, key_heads, dim = (shape[s] for s in ("B", "L", "Hq", "Hk", "D"))
    queries = max(LEAST_QUERIES, 1 << (heads // key_heads - 1).bit_length())
    moved = attention_bench.ENTRY.bytes_moved(shape, dtype, Pass.FORWARD)
    stretches = cdiv(length, config.stretch)
    programs = rows * key_heads * stretches
    parts = 4.0 * rows * heads * stretches * (dim + 2)
    read = 1.5 * rows * length * key_heads * dim * dtype.itemsize
    return Work(
        programs=programs,
        flops=4.0 * programs * queries * config.stretch * dim,
        memory_bytes=moved + parts,
        cache_bytes=read + 2 * parts,
        accumulators=queries * (dim + 2 * config.block_l),
        shared_bytes=(queries + 2 * config.num_stages * config.block_l) * dim * dtype.itemsize,
        loads_in_flight=config.num_stages,
        tile=(queries, config.block_l),
        warps=config.num_warps,
    )


def attention_present(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    from latent_rl.kernels.slot_attention.triton_impl import CONFIGS

    return CONFIGS[dtype]


def attention(inputs: Inputs, config: Any) -> Call:
    from latent_rl.kernels.slot_attention.triton_impl import slot_attention

    t = inputs
    longest, scale = t["row_keys"].shape[1], t["query"].shape[2] ** -0.5
    return lambda: slot_attention(
        t["query"], t["keys"], t["values"], t["runs"], longest, scale, config
    )


def attention_truth(inputs: Inputs) -> Tensor:
    wide = {name: v.float() if v.is_floating_point() else v for name, v in inputs.items()}
    return attention_bench.masked(wide).reshape(inputs["query"].shape)


def attention_kernels() -> tuple[Any, ...]:
    from latent_rl.kernels.slot_attention import triton_impl

    return (triton_impl._slot_attention_stretch_kernel,)


TUNABLES = {
    "nearest_code": Tunable(
        search_bench.ENTRY,
        search_configs,
        search_work,
        search_present,
        search,
        search_bench.exact_distances,
        wrong_codes,
        search_kernels,
    ),
    "gated_merge": Tunable(
        merge_bench.ENTRY,
        merge_configs,
        merge_work,
        merge_present,
        merge,
        merge_truth,
        far_off,
        merge_kernels,
    ),
    "slot_attention": Tunable(
        attention_bench.ENTRY,
        attention_configs,
        attention_work,
        attention_present,
        attention,
        attention_truth,
        far_off,
        attention_kernels,
    ),
}
