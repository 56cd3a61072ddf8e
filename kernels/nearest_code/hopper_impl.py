"""Hopper backend of nearest_code: the Triton search with its screen replaced by CUDA C++.

The screen (cuda_impl.cu) gives what screen.py gives, under the same bound: codes of the rows it can
decide and a list of the others. Preparation, the second search and distances are Triton's.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from latent_rl.kernels.nearest_code.configs import Config
from latent_rl.kernels.nearest_code.triton_impl import (
    Search,
    SearchStats,
    everything,
    only_codes,
    screen_bounds,
)
from torch import Tensor

from latent_rl.native.nearest_code_hopper import WIDEST, copyable, screen

__all__ = ["nearest_code", "nearest_code_with_stats", "nearest_codes", "tile"]

# Eight slots' worth of a score's last bits are given to a key.
_KEY_BLOCK = 8
_CHUNK = 64


def tile(width: int) -> Config:
    """The screen's tile as :func:`screen_bounds` counts it: a chain is as long as a row."""
    chain = -(-width // _CHUNK) * _CHUNK
    return Config(block_n=256, block_k=_KEY_BLOCK, block_d=chain, num_warps=12, num_stages=6)


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest code of every row; contract and arguments as the Triton backend's."""
    codes, distance, _ = nearest_code_with_stats(x, codebook, metric)
    return codes, distance


def nearest_codes(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The codes of ``nearest_code``, without the pass over the rows that distances take."""
    with torch.cuda.device_of(x):
        return only_codes(HopperSearch.parts(x, codebook, metric))


def nearest_code_with_stats(
    x: Tensor, codebook: Tensor, metric: str
) -> tuple[Tensor, Tensor, SearchStats]:
    """``nearest_code``, and how many rows its screen could not decide, counted on the device."""
    with torch.cuda.device_of(x):
        return everything(HopperSearch.parts(x, codebook, metric))


class HopperSearch(Search):
    """A search whose screen runs on TMA and wgmma.

    Raises:
        TypeError: for dtypes, ValueError: for widths that the screen does not take.
    """

    multiplies: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})

    @classmethod
    def of(cls, x: Tensor, codebook: Tensor, metric: str, config: Config | None = None) -> Self:
        if config is not None:
            raise ValueError("nearest_code: hopper's tile is fixed, so config must be None")
        if x.dtype not in cls.multiplies:
            raise TypeError(f"nearest_code: hopper takes bfloat16 and float16, got {x.dtype}")
        if x.shape[-1] > WIDEST:
            raise ValueError(f"nearest_code: hopper takes widths up to {WIDEST}, got {x.shape[-1]}")
        if x.stride(-1) != 1:
            x = x.contiguous()
        return cls(x, codebook.contiguous(), metric, False, tile(x.shape[-1]))

    def _screen(
        self,
        prepared: tuple[Tensor, Tensor, Tensor, Tensor],
        limits: Tensor,
        out: tuple[Tensor, Tensor, Tensor, Tensor],
        flags: dict[str, int | bool],
    ) -> None:
        table, bias, scale, _ = prepared
        screen(
            copyable(self.x),
            copyable(table),
            bias,
            scale if flags["SCALED"] else None,
            limits,
            out,
            screen_bounds(self._config(), self.x.shape[-1]),
        )
