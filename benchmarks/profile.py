"""Run each op a few times inside NVTX ranges, for ``nsys`` and ``ncu``.

nsys profile -t cuda,nvtx python -m benchmarks profile --device cuda
ncu --nvtx --nvtx-include "sample_codes/" python -m benchmarks profile --ops sample_codes
"""

from __future__ import annotations

import nvtx
import torch

from benchmarks.registry import entries


def profile(device_name: str, ops: list[str] | None, repeats: int) -> None:
    """Call every shape of the named ops ``repeats`` times, one range per op and shape."""
    device = torch.device(device_name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, entry in sorted(entries().items()):
        if ops is not None and name not in ops:
            continue
        for shape in entry.shapes:
            call = entry.ours(entry.make_inputs(shape, device, dtype))
            call()
            with nvtx.annotate(f"{name} {shape}"):
                for _ in range(repeats):
                    call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
