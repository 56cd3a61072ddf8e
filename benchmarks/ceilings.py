"""The two roofs of a machine, measured in the same run as the ops: copy and matrix product."""

from __future__ import annotations

import torch

from benchmarks.machine import gpu
from benchmarks.registry import Call
from benchmarks.timing import clock_for

# Large enough to leave every cache; small enough for a short run.
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
ROUNDS = 7


def best_ms(call: Call, device: torch.device) -> float:
    """The fastest of a few calls: a roof is what the machine can do, not what it usually does."""
    clock = clock_for(device, own_stream=False)
    call()
    return min(clock(call) for _ in range(ROUNDS))


def copy_gb_per_s(device: torch.device) -> float:
    """Gigabytes per second of a large copy, read and written bytes both counted."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_ms(lambda: target.copy_(source), device) / 1e6


def gemm_gflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Gigaflops per second of a square matrix product of random values."""
    side = GEMM_SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / best_ms(lambda: torch.mm(a, b, out=out), device) / 1e6


def measure_ceilings(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, object]:
    """Both roofs; on a GPU also the clocks right after, while it is still warm."""
    found: dict[str, object] = {
        "copy_gb_per_s": copy_gb_per_s(device),
        "gemm_gflop_per_s": {
            str(dtype).removeprefix("torch."): gemm_gflop_per_s(device, dtype) for dtype in dtypes
        },
    }
    if device.type == "cuda":
        found["clocks"] = gpu("clocks.sm,clocks.mem,power.draw,temperature.gpu")
    return found
