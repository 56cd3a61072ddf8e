"""Attention of one new position per row over its own slot, in the place of the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from latent_rl import ops

__all__ = ["NAME", "attention_of", "slot_attention", "visible_range"]

NAME = "latent_rl_slots"


def visible_range(ends: Tensor, window: int | None = None) -> Tensor:
    """int64 [n, 1, 1, 2]: the first visible position of each row and one past the last.

    It takes the place of an attention mask: transformers hands a 4D one through as it is.
    """
    begins = torch.zeros_like(ends) if window is None else (ends - window).clamp_min(0)
    return torch.stack((begins, ends), 1)[:, None, None]


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``ops.slot_attention`` under the signature of transformers' attention functions.

    Args:
        module: the attention layer (unused).
        query: [n, heads, 1, D].
        key, value: [n, key heads, L, D].
        attention_mask: from :func:`visible_range`.
        dropout: ignored: the engine decodes in eval mode.
        scaling: of the products.

    Returns:
        [n, 1, heads, D] and None.

    Raises:
        ValueError: for variants of attention this is not: soft-capped scores, sinks.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"Decoder: attention with {name} is not supported; use generate()")
    begins, ends = attention_mask[:, 0, 0].unbind(1)
    # Under autocast the query may be narrower than what is cached.
    out = ops.slot_attention(
        query[:, :, 0].to(key.dtype),
        key.transpose(1, 2),
        value.transpose(1, 2),
        begins,
        ends,
        scale=scaling,
    )
    return out[:, None].to(query.dtype), None


ALL_ATTENTION_FUNCTIONS.register(NAME, slot_attention)


@contextmanager
def attention_of(*stacks: nn.Module) -> Iterator[None]:
    """Let decoder stacks use :func:`slot_attention` until the block ends."""
    configs = [cast(Any, stack).config for stack in stacks]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
