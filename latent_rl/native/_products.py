"""The dtype in which torch multiplies 16-bit matrices fastest on this processor."""

from __future__ import annotations

from collections.abc import Callable

import torch

from latent_rl import _C
from latent_rl.native._call import accumulator

__all__ = ["product_dtype"]


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a product of matrices of ``dtype`` should be made on the CPU.

    Both choices accumulate in float32 (float64 for float64); they differ in speed and in whether
    the product itself is rounded to 16 bits. The one place that decides:

    - bfloat16 stays bfloat16 where the instruction set in use has AVX-512 BF16 and torch has
      oneDNN, which uses it: 2.3 times the float32 rate on Zen 4. Without those instructions oneDNN
      widens in software, so the product is made in float32.
    - float16 is always multiplied in float32: without AVX-512 FP16 torch's own loops do 5 to 50
      GFLOP/s where float32 does 180, and some layouts are a hundred times slower again.

    Numbers in kernels/gated_merge/README.md.
    """
    has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
    if dtype == torch.bfloat16 and _C.isa() == "avx512bf16" and has_onednn():
        return dtype
    return accumulator(dtype)
