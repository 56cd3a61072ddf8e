"""Triton backend of nearest_code: a screen on matrix units, then an exact search where needed.

The screen (screen.py) multiplies in the input's own dtype, float32 rounded to tf32 by us, and keeps
the best score and the runner-up of every row. Rows whose two lie within twice the proven error
bound are listed on the device and searched again (rerank.py): of every code within the bound the
distance is taken in float64. README.md has the proof.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import triton
from latent_rl.kernels.nearest_code.configs import (
    DISTANCE_BLOCK_D,
    DISTANCE_BLOCK_N,
    MEAN_BLOCK_D,
    MEAN_SAMPLE,
    MERGE_BLOCK_N,
    MOST_REGISTERS,
    Config,
    choose,
    choose_prepare,
    choose_rerank,
    machine_of,
    rerank_block_d,
    splits_of,
)
from latent_rl.kernels.nearest_code.prepare import (
    LIMITS,
    _nearest_code_mean_kernel,
    _nearest_code_prepare_kernel,
)
from latent_rl.kernels.nearest_code.rerank import (
    _nearest_code_distance_kernel,
    _nearest_code_rerank_kernel,
)
from latent_rl.kernels.nearest_code.screen import (
    _nearest_code_merge_kernel,
    _nearest_code_screen_kernel,
)
from torch import Tensor

__all__ = [
    "Bounds",
    "Search",
    "SearchStats",
    "everything",
    "nearest_code",
    "nearest_code_with_stats",
    "nearest_codes",
    "only_codes",
    "screen_bounds",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# What the second dimension of a grid takes.
MOST_GROUPS = 65535
_METRICS = {"l2": 0, "cosine": 1, "dot": 2}


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest code of every row; contract and arguments as the reference, without float64.

    No host synchronisation: how many rows are searched again only the device knows.
    """
    codes, distance, _ = nearest_code_with_stats(x, codebook, metric)
    return codes, distance


def nearest_codes(x: Tensor, codebook: Tensor, metric: str, config: Config | None = None) -> Tensor:
    """The codes of ``nearest_code``, without the pass over the rows that distances take.

    ``config`` replaces the table's choice of the screen's tiles; codes do not depend on it.
    """
    with torch.cuda.device_of(x):
        return only_codes(Search.parts(x, codebook, metric, config))


@dataclass(frozen=True)
class SearchStats:
    """How much of a search the screen could not decide.

    Attributes:
        rows: rows searched, G * N.
        reranked: int32 [G] on the device, rows of every group that were searched again.
    """

    rows: int
    reranked: Tensor

    @property
    def fraction_reranked(self) -> float:
        """Share of rows searched again; 0 without rows. Waits for the device."""
        return int(self.reranked.sum()) / self.rows if self.rows else 0.0


def nearest_code_with_stats(
    x: Tensor, codebook: Tensor, metric: str
) -> tuple[Tensor, Tensor, SearchStats]:
    """``nearest_code``, and how many rows its screen could not decide, counted on the device."""
    with torch.cuda.device_of(x):
        return everything(Search.parts(x, codebook, metric))


def only_codes(searches: Sequence[Search]) -> Tensor:
    """Codes of parts of the groups, joined."""
    return _joined([search.codes()[0] for search in searches])


def everything(searches: Sequence[Search]) -> tuple[Tensor, Tensor, SearchStats]:
    """Codes, distances and statistics of parts of the groups, joined."""
    codes, distances, reranked = [], [], []
    for search in searches:
        found, again = search.codes()
        codes.append(found)
        distances.append(search.distances(found))
        reranked.append(again)
    every = _joined(codes)
    return every, _joined(distances), SearchStats(every.numel(), _joined(reranked))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Bounds(NamedTuple):
    """The constants of README.md's bound that depend on shapes alone."""

    accumulation: float
    underflow: float
    slack: float


def screen_bounds(config: Config, width: int) -> Bounds:
    """Bounds that hold for the scores of the screen and of the second search alike."""
    again = rerank_block_d(config, width)
    longest = max(config.block_d, again)
    chains = triton.cdiv(width, min(config.block_d, again))
    # Chains on the matrix unit, their sum, the bits a key gives to its column, bias and scale.
    accumulation = longest * 2.0**-22 + chains * 2.0**-24 + config.block_k * 2.0**-23 + 2.0**-20
    # The last: float32 sums of squares and the arithmetic of the bound itself.
    return Bounds(accumulation, (width + 8) * 2.0**-125, 1 + 2.0**-10 + width * 2.0**-23)


@dataclass(frozen=True)
class Search:
    """Operands [G, N, D] and [G, K, D] of a search, and what the kernels are told about them."""

    x: Tensor
    codebook: Tensor
    metric: str
    round: bool  # float32, which tf32 does not hold; 16-bit values are multiplied as they are
    config: Config | None = None  # of the screen, in the place of the table's

    @classmethod
    def of(cls, x: Tensor, codebook: Tensor, metric: str, config: Config | None = None) -> Self:
        rounded = x.dtype == torch.float32
        if INTERPRETED and x.dtype == torch.bfloat16:
            # Triton 3.6's interpreter multiplies the bits of bfloat16 numbers as if they were
            # integers; as float32 they are the same numbers.
            x, codebook = x.float(), codebook.float()
        if x.stride(-1) != 1:
            x = x.contiguous()
        return cls(x, codebook.contiguous(), metric, rounded, config)

    @classmethod
    def parts(
        cls, x: Tensor, codebook: Tensor, metric: str, config: Config | None = None
    ) -> list[Self]:
        """Searches of as many groups as a grid's second dimension holds, one at the least."""
        if x.shape[0] <= MOST_GROUPS:
            return [cls.of(x, codebook, metric, config)]
        return [
            cls.of(x[i : i + MOST_GROUPS], codebook[i : i + MOST_GROUPS], metric, config)
            for i in range(0, x.shape[0], MOST_GROUPS)
        ]

    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes int64 [G, N], and how many rows of every group were searched again."""
        groups, n, width = self.x.shape
        device = self.x.device
        codes = torch.empty((groups, n), dtype=torch.int64, device=device)
        again = choose_rerank(n)
        blocks = triton.cdiv(n, again.block_n) * triton.cdiv(self.codebook.shape[1], again.block_k)
        programs = max(1, min(blocks, max(again.programs // max(groups, 1), again.block_n)))
        # One fill for limits and counters: zero is zero in both types.
        state = torch.zeros(groups * (LIMITS + 1 + programs), dtype=torch.int32, device=device)
        limits, count, arrived = state.split([groups * LIMITS, groups, groups * programs])
        if codes.numel() == 0:
            return codes, count
        limits = limits.view(torch.float32)
        prepared = self._prepared(limits)
        rows = torch.empty((groups, n), dtype=torch.int64, device=device)
        threshold = torch.empty((groups, n), dtype=torch.float32, device=device)
        flags = {
            "K": self.codebook.shape[1],
            "D": width,
            "ROUND": self.round,
            "SHIFT": self.round and self.metric == "l2",
            "SCALED": not self.round and self.metric == "cosine",
        }
        out = (codes, rows, threshold, count)
        self._screen(prepared, limits, out, flags)
        self._rerank(prepared, out, arrived, flags)
        return codes, count

    def _rerank(
        self,
        prepared: tuple[Tensor, ...],
        out: tuple[Tensor, ...],
        arrived: Tensor,
        flags: dict[str, int | bool],
    ) -> None:
        """Search again what the screen has listed."""
        groups, n, width = self.x.shape
        again, config = choose_rerank(n), self._config()
        programs = arrived.shape[0] // groups
        places = (arrived.shape[0], again.block_n)
        values = torch.empty(places, dtype=torch.float64, device=arrived.device)
        _nearest_code_rerank_kernel[(programs, groups)](
            self.x,
            self.codebook,
            *prepared,
            *out,
            values,
            torch.empty_like(values, dtype=torch.int32),
            arrived,
            n,
            *self.x.stride()[:2],
            **flags,
            METRIC=_METRICS[self.metric],
            BLOCK_N=again.block_n,
            BLOCK_K=again.block_k,
            BLOCK_D=rerank_block_d(config, width),
            EXACT_D=again.exact_d(self.codebook.element_size()),
            num_warps=again.num_warps,
            maxnreg=MOST_REGISTERS,
        )

    def _config(self) -> Config:
        if self.config is not None:
            return self.config
        _, n, width = self.x.shape
        machine = machine_of(self.x.device)
        return choose(machine.architecture, self.x.dtype, n, width)

    def _prepared(self, limits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes to multiply with, their biases and scales, and what is subtracted from rows."""
        groups, num_codes, width = self.codebook.shape
        floats = {"dtype": torch.float32, "device": self.codebook.device}
        table = torch.empty_like(self.codebook)
        bias, scale = torch.empty((2, groups, num_codes), **floats)
        mean, shift = torch.empty((2, groups, width), **floats)
        if self.round:
            _nearest_code_mean_kernel[(triton.cdiv(width, MEAN_BLOCK_D), groups)](
                self.codebook,
                mean,
                K=num_codes,
                D=width,
                SAMPLE=min(MEAN_SAMPLE, triton.next_power_of_2(num_codes)),
                BLOCK_D=MEAN_BLOCK_D,
                num_warps=4,
            )
        tile = choose_prepare(width)
        _nearest_code_prepare_kernel[(triton.cdiv(num_codes, tile.block_k), groups)](
            self.codebook,
            mean,
            table,
            bias,
            scale,
            shift,
            limits,
            K=num_codes,
            D=width,
            METRIC=_METRICS[self.metric],
            CENTRE=self.round,
            BLOCK_K=tile.block_k,
            BLOCK_D=tile.block_d,
            num_warps=tile.num_warps,
            maxnreg=MOST_REGISTERS,
        )
        return table, bias, scale, shift

    def _screen(
        self,
        prepared: tuple[Tensor, Tensor, Tensor, Tensor],
        limits: Tensor,
        out: tuple[Tensor, Tensor, Tensor, Tensor],
        flags: dict[str, int | bool],
    ) -> None:
        """Codes of the rows that the screen decides, and a list of the others, into ``out``."""
        groups, n, width = self.x.shape
        num_codes, device = self.codebook.shape[1], self.x.device
        config = self._config()
        splits = splits_of(config, groups, n, num_codes, machine_of(device).processors)
        parts = torch.empty((2, splits, groups, n) if splits > 1 else (2, 0), device=device)
        part_codes = torch.empty_like(parts[0], dtype=torch.int32)
        error = torch.empty((groups, n) if splits > 1 else (0,), device=device)
        split_k = triton.cdiv(triton.cdiv(num_codes, splits), config.block_k) * config.block_k
        _nearest_code_screen_kernel[(triton.cdiv(n, config.block_n), groups, splits)](
            self.x,
            *prepared,
            limits,
            *out,
            *parts,
            part_codes,
            error,
            n,
            *self.x.stride()[:2],
            *screen_bounds(config, width),
            **flags,
            SPLITS=splits,
            SPLIT_K=split_k,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            _nearest_code_merge_kernel[(triton.cdiv(n, MERGE_BLOCK_N), groups)](
                *out, *parts, part_codes, error, n, SPLITS=splits, BLOCK_N=MERGE_BLOCK_N
            )

    def distances(self, codes: Tensor) -> Tensor:
        """Distances float32 [G, N] of the codes chosen."""
        groups, n, width = self.x.shape
        distance = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        if codes.numel():
            _nearest_code_distance_kernel[(triton.cdiv(n, DISTANCE_BLOCK_N), groups)](
                self.x,
                self.codebook,
                codes,
                distance,
                n,
                *self.x.stride()[:2],
                K=self.codebook.shape[1],
                D=width,
                METRIC=_METRICS[self.metric],
                BLOCK_N=DISTANCE_BLOCK_N,
                BLOCK_D=DISTANCE_BLOCK_D,
                num_warps=4,
            )
        return distance
