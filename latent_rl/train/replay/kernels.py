"""Kernels that attend over a packed row."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from latent_rl.train.replay.blocks import Packing

__all__ = ["FlashVarlen", "PackedKernel", "SdpaBlocks", "choose_kernel"]


class PackedKernel(Protocol):
    """Exact attention within the pieces of a packing."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        *,
        scaling: float | None,
        window: int | None,
        dropout: float,
    ) -> Tensor:
        """Query [N, heads, D], key and value [N, key heads, D] -> [N - packing.begin, heads, D].

        scaling: of the products, None for 1 / sqrt(D); window: keys a query sees, itself included;
        dropout: of the weights.
        """
        ...


@dataclass(frozen=True)
class SdpaBlocks:
    """Pieces of similar size padded into one call of `scaled_dot_product_attention`.

    repeats_keys  copy keys and values for the heads that share them where a block needs a mask.
                  PyTorch's fast kernels on CUDA take shared heads or a mask, not both, and its
                  plain one holds all scores.
    """

    repeats_keys: bool = False

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        *,
        scaling: float | None,
        window: int | None,
        dropout: float,
    ) -> Tensor:
        """See `PackedKernel`."""
        outputs = []
        for block in packing.blocks:
            rows, queries, keys = block.shape
            mask = block.mask(window)
            shared = query.shape[1] // key.shape[1]
            repeats = shared if mask is not None and self.repeats_keys else 1
            seen, read = (_gather(states, block.keys, rows, keys) for states in (key, value))
            if repeats > 1:
                seen, read = (s.repeat_interleave(repeats, 1) for s in (seen, read))
            out = scaled_dot_product_attention(
                _gather(query, block.queries, rows, queries),
                seen,
                read,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=shared > repeats,
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, packing.restore)


def _gather(states: Tensor, index: Tensor, rows: int, length: int) -> Tensor:
    """[N, heads, D] -> [rows, heads, length, D]."""
    gathered = states.index_select(0, index)
    return gathered.view(rows, length, *gathered.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class FlashVarlen:
    """All pieces in one call of flash-attention's kernel for sequences of any length.

    function  `flash_attn.flash_attn_varlen_func` (2.1 or later: with fewer queries than keys, the
              last query sees the last key)
    """

    function: Any

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        *,
        scaling: float | None,
        window: int | None,
        dropout: float,
    ) -> Tensor:
        """See `PackedKernel`."""
        pieces = packing.ragged
        found: Tensor = self.function(
            query.index_select(0, pieces.queries),
            key.index_select(0, pieces.keys),
            value.index_select(0, pieces.keys),
            pieces.query_ends,
            pieces.key_ends,
            pieces.most_queries,
            pieces.most_keys,
            dropout_p=dropout,
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
        return found.index_select(0, pieces.restore)


@cache
def _flash() -> FlashVarlen | None:
    """The kernel of an installed flash-attention."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return FlashVarlen(importlib.import_module("flash_attn").flash_attn_varlen_func)


def choose_kernel(query: Tensor, packing: Packing) -> PackedKernel:
    """Flash-attention where it is installed and takes the input, else SDPA."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and query.shape[-1] <= 256 and packing.is_causal:
        return _flash() or SdpaBlocks(repeats_keys=True)
    return SdpaBlocks(repeats_keys=query.is_cuda)
