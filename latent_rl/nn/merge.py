"""The merge: how a code changes the trunk's state (the language world model's only new weights)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from latent_rl import ops
from latent_rl.nn.precision import autocast_dtype


class MergeBlock(nn.Module):
    """``block(e, c) = W_down (silu(W_gate [e; c]) * (W_up [e; c]))`` (paper's merge MLP)."""

    def __init__(self, hidden: int, code_dim: int, intermediate: int) -> None:
        """Weights: gate and up [I, H + D], down [H, I]; normal, std 1/sqrt(fan-in)."""
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(intermediate, hidden + code_dim))
        self.w_up = nn.Parameter(torch.empty(intermediate, hidden + code_dim))
        self.w_down = nn.Parameter(torch.empty(hidden, intermediate))
        for weight in (self.w_gate, self.w_up, self.w_down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def tables(self, codebook: Tensor) -> Tensor:
        """The code's share of the wide products, [2, K, I], for :meth:`forward` without gradient.

        It holds for the weights and the codebook [K, D] as they are now.
        """
        dtype = autocast_dtype(codebook.device) or self.w_gate.dtype
        gate, up = self.w_gate.to(dtype), self.w_up.to(dtype)
        made: Tensor = ops.merge_tables(codebook.to(dtype), gate, up)
        return made

    def forward(
        self,
        e: Tensor,
        codes: Tensor,
        codebook: Tensor,
        code_vectors: Tensor | None = None,
        tables: Tensor | None = None,
    ) -> Tensor:
        """[..., H], int64 [...], [K, D], [..., D] | None -> [..., H] in the weights' dtype.

        Without ``code_vectors`` half of the two wide products is a gather from a K-row table;
        with them the gradient of the code goes to ``code_vectors`` (straight-through). With
        ``tables`` the table is not made but read, and there is no gradient at all.
        """
        weights = [self.w_gate, self.w_up, self.w_down]
        dtype = autocast_dtype(e.device) or self.w_gate.dtype
        e = e.to(dtype)
        gate, up, down = (w.to(dtype) for w in weights)
        if tables is not None:
            step: Tensor = ops.gated_merge_step(e, codes, tables, gate, up, down)
            return step
        codebook = codebook.to(dtype)
        vectors = None if code_vectors is None else code_vectors.to(dtype)
        merged: Tensor = ops.gated_merge(e, codes, codebook, gate, up, down, code_vectors=vectors)
        return merged


class Merge(nn.Module):
    """Base of the merge forms: a chain of blocks, x_0 = e, x_i = x_{i-1} + b_i(x_{i-1}, c)."""

    def __init__(self, hidden: int, code_dim: int, intermediate: int, blocks: int) -> None:
        """Build the blocks; every form needs at least one.

        Raises:
            ValueError: for ``blocks`` below 1.
        """
        super().__init__()
        if blocks < 1:
            raise ValueError(f"Merge: blocks must be >= 1, got {blocks}")
        self.blocks = nn.ModuleList(
            MergeBlock(hidden, code_dim, intermediate) for _ in range(blocks)
        )

    def tables(self, codebook: Tensor) -> list[Tensor]:
        """Per block what depends on the code alone, [2, K, I], for steps without gradient."""
        return [cast(MergeBlock, block).tables(codebook) for block in self.blocks]

    def _chain(
        self,
        e: Tensor,
        codes: Tensor,
        codebook: Tensor,
        code_vectors: Tensor | None,
        tables: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """The last block's input plus output, and its output alone."""
        x = delta = e
        for i, block in enumerate(self.blocks):
            made = None if tables is None else tables[i]
            delta = block(x, codes, codebook, code_vectors, made)
            x = x + delta
        return x, delta

    def forward(
        self,
        e: Tensor,
        codes: Tensor,
        codebook: Tensor,
        code_vectors: Tensor | None = None,
        tables: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Merged state: e [..., H], codes int64 [...] in [0, K), codebook [K, D] -> [..., H].

        ``tables`` of :meth:`tables` save most of the code's cost in steps without gradient.
        """
        raise NotImplementedError


class ResidualMerge(Merge):
    """``e + b1(e, c) + b2(e + b1, c)``: last projections start at zero, so it starts as e."""

    def __init__(self, hidden: int, code_dim: int, intermediate: int, blocks: int) -> None:
        """See :class:`Merge`."""
        super().__init__(hidden, code_dim, intermediate, blocks)
        for block in self.blocks:
            nn.init.zeros_(block.w_down)  # type: ignore[arg-type]

    def forward(
        self,
        e: Tensor,
        codes: Tensor,
        codebook: Tensor,
        code_vectors: Tensor | None = None,
        tables: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """See :meth:`Merge.forward`."""
        return self._chain(e, codes, codebook, code_vectors, tables)[0]


class NormDeltaMerge(Merge):
    """``norm(e + b1 + b2) - e`` (CoLA's pretraining form)."""

    def __init__(
        self, hidden: int, code_dim: int, intermediate: int, blocks: int, norm: nn.Module
    ) -> None:
        """``norm`` is copied: it must not share weights with the trunk's final norm."""
        super().__init__(hidden, code_dim, intermediate, blocks)
        self.norm = copy.deepcopy(norm)

    def forward(
        self,
        e: Tensor,
        codes: Tensor,
        codebook: Tensor,
        code_vectors: Tensor | None = None,
        tables: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """See :meth:`Merge.forward`."""
        x, _ = self._chain(e, codes, codebook, code_vectors, tables)
        normed: Tensor = self.norm(x)
        return normed - e


class BlockMerge(Merge):
    """``norm(b2(e + b1, c))``: the last block's output alone (the paper's inference form)."""

    def __init__(
        self, hidden: int, code_dim: int, intermediate: int, blocks: int, norm: nn.Module
    ) -> None:
        """``norm`` is copied: it must not share weights with the trunk's final norm."""
        super().__init__(hidden, code_dim, intermediate, blocks)
        self.norm = copy.deepcopy(norm)

    def forward(
        self,
        e: Tensor,
        codes: Tensor,
        codebook: Tensor,
        code_vectors: Tensor | None = None,
        tables: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """See :meth:`Merge.forward`."""
        _, last = self._chain(e, codes, codebook, code_vectors, tables)
        normed: Tensor = self.norm(last)
        return normed
