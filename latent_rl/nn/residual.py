"""Residual quantization: several levels, each coding what the levels before left over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from latent_rl.nn.quantizers import VectorQuantizer

__all__ = ["ResidualQuantized", "ResidualQuantizer"]


class ResidualQuantized(NamedTuple):
    """What :class:`ResidualQuantizer` returns for N rows and Q levels.

    Attributes:
        codes: int64 [N, Q]; -1 for a non-finite row and for levels that were dropped.
        vectors: [N, D] float32, the sum of the levels' codes; the gradient goes straight through.
        loss: scalar, the mean of the levels' losses.
        perplexity: [Q], of the chosen codes of each level; NaN for dropped levels.
    """

    codes: Tensor
    vectors: Tensor
    loss: Tensor
    perplexity: Tensor


class ResidualQuantizer(nn.Module):
    """``x ~ c_1 + c_2 + ... + c_Q``: level q codes ``x - c_1 - ... - c_{q-1}``.

    As in SoundStream (Zeghidour et al. 2021, algorithm 1). Every level is a
    :class:`VectorQuantizer` of the Euclidean metric; in training each learns from the residuals it
    sees, and its statistics are reduced over ranks like any codebook's.
    """

    levels: nn.ModuleList

    def __init__(self, levels: Sequence[VectorQuantizer], *, drop_levels: bool = False) -> None:
        """Stack quantizers of one width.

        Args:
            levels: at least one; the first codes the rows themselves.
            drop_levels: in training, use only the first q levels with q drawn evenly from 1 .. Q,
                one draw per call, so that fewer levels decode well too.

        Raises:
            ValueError: without levels, for different widths, or for the cosine metric (a
                residual has no direction of its own).
        """
        super().__init__()
        if not levels:
            raise ValueError("ResidualQuantizer: levels must have at least one quantizer, got none")
        widths = {level.codebook.dim for level in levels}
        if len(widths) > 1:
            raise ValueError(f"ResidualQuantizer: levels must have one width, got {sorted(widths)}")
        metrics = {level.codebook.metric for level in levels}
        if metrics != {"l2"}:
            raise ValueError(
                f"ResidualQuantizer: levels must have the l2 metric, got {sorted(metrics)}"
            )
        self.levels = nn.ModuleList(levels)
        self.drop_levels = drop_levels

    @property
    def num_levels(self) -> int:
        """Q."""
        return len(self.levels)

    def forward(self, features: Tensor, seed: int) -> ResidualQuantized:
        """Quantise rows [N, D]; ``seed`` draws the number of levels where they are dropped."""
        x = features.float()
        used = self._used(seed)
        total = torch.zeros_like(x)
        codes = torch.full((x.shape[0], self.num_levels), -1, device=x.device)
        losses: list[Tensor] = []
        perplexity = x.new_full((self.num_levels,), torch.nan)
        for q, level in enumerate(self._quantizers()[:used]):
            # The residual carries the encoder's gradient of the commitment at every level.
            out = level(x - total, seed=seed)
            total = total + out.vectors.detach()
            codes[:, q] = out.codes
            perplexity[q] = out.perplexity
            losses.append(out.loss)
        straight = x + (total - x).detach()
        return ResidualQuantized(codes, straight, torch.stack(losses).mean(), perplexity)

    def _used(self, seed: int) -> int:
        if not (self.drop_levels and self.training):
            return self.num_levels
        draw = torch.Generator().manual_seed(seed)
        return int(torch.randint(1, self.num_levels + 1, (1,), generator=draw))

    def _quantizers(self) -> list[VectorQuantizer]:
        return [cast(VectorQuantizer, level) for level in self.levels]

    @torch.no_grad()
    def codes(self, features: Tensor) -> Tensor:
        """Codes of all levels, learning nothing: [..., D] -> int64 [..., Q]."""
        residual, found = features.float(), []
        for level in self._quantizers():
            chosen = level.codes(residual)
            found.append(chosen)
            residual = residual - level.codebook(chosen.clamp_min(0)).float()
        return torch.stack(found, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Sums of the levels' codes: int64 [..., q] with q <= Q, -1 adds nothing -> [..., D].

        Raises:
            ValueError: for more levels than there are.
        """
        if not 1 <= codes.shape[-1] <= self.num_levels:
            raise ValueError(
                f"ResidualQuantizer.decode: codes must have 1 to {self.num_levels} levels, "
                f"got {codes.shape[-1]}"
            )
        parts = [
            level.codebook(chosen.clamp_min(0)).float() * (chosen >= 0)[..., None]
            for level, chosen in zip(self._quantizers(), codes.unbind(-1), strict=False)
        ]
        return torch.stack(parts).sum(0)
