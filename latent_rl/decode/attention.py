"""Attention of one new position per row over its own slot, in the place of the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from latent_rl import ops

__all__ = ["NAME", "attention_of", "slot_attention", "visible_runs"]

NAME = "latent_rl_slots"


def visible_runs(places: Tensor, ends: Tensor, longest: int, window: int | None = None) -> Tensor:
    """int64 [n, 1, longest, 5]: what each row sees, as ``ops.slot_attention`` wants it.

    It takes the place of an attention mask: transformers hands a 4D one through as it is. The third
    axis repeats, without memory, to say how long the longest row may be.

    Args:
        places: int64 [n, 3], shared_at, shared and own_at of each row.
        ends: int64 [n], one past the last visible position.
        longest: bound of all ends.
        window: positions a row sees at most, or None for all.
    """
    begins = torch.zeros_like(ends) if window is None else (ends - window).clamp_min(0)
    runs = torch.cat((begins[:, None], ends[:, None], places), 1)
    return runs[:, None, None].expand(-1, -1, longest, -1)


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
        key, value: [1, key heads, S, D], a layer's whole storage.
        attention_mask: from :func:`visible_runs`.
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
    # Under autocast the query may be narrower than what is cached.
    out = ops.slot_attention(
        query[:, :, 0].to(key.dtype),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        attention_mask[:, 0, 0],
        longest=attention_mask.shape[2],
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
