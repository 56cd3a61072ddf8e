"""Per-row seeds: what makes a row's noise independent of the batch around it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["row_seeds"]


def row_seeds(seed: int | Tensor, n: int, device: torch.device | str | None = None) -> Tensor:
    """One int64 seed per row, from one seed: ``splitmix64(seed + row)``.

    Args:
        seed: int, int64 scalar tensor (kept on its device), or int64 [n], returned as it is.
        n: number of rows.
        device: where the seeds shall be; defaults to the seed's device, or the CPU.

    Returns:
        int64 [n].

    Raises:
        TypeError: when a seed tensor is not int64.
        ValueError: when a seed tensor is neither a scalar nor [n].

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014).
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"row_seeds: seed must be int64, got {seed.dtype}")
        target = seed.device if device is None else torch.device(device)
        if seed.shape == (n,):
            return seed if seed.device == target else seed.to(target)
        if seed.ndim != 0:
            raise ValueError(
                f"row_seeds: seed must be a scalar or have shape [{n}], got {list(seed.shape)}"
            )
        base = seed.to(target)
    elif torch.compiler.is_compiling() or torch.device(device or "cpu").type != "cpu":
        # Filled on the device: a copy from the host would be a synchronisation.
        base = torch.full((), _signed(seed), dtype=torch.int64, device=device)
    else:
        return torch.from_numpy(_row_seeds_on_host(seed, n))
    return _splitmix64(base + torch.arange(n, device=base.device))


def _row_seeds_on_host(seed: int, n: int) -> np.ndarray:
    # NumPy's calls on small arrays cost a tenth of torch's. Arrays of uint64 wrap, as is wanted.
    z = np.arange(n, dtype=np.uint64)
    z += np.uint64((seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z.view(np.int64)


def _signed(value: int) -> int:
    """The int64 with the same low 64 bits as a Python int."""
    low = value & 0xFFFFFFFFFFFFFFFF
    return low - (1 << 64) if low >= 1 << 63 else low


def _splitmix64(state: Tensor) -> Tensor:
    def shifted(z: Tensor, bits: int) -> Tensor:
        # int64 shifts copy the sign; the mask makes it the logical shift of the definition.
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = state + _signed(0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ shifted(z, 31)
