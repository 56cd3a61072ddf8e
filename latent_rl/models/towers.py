"""Towers: short stacks of the backbone's own decoder class, fed with states."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

# Kinds of attention a tower may inherit; linear-attention layers need a cache of another kind.
_ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def make_tower(
    decoder: nn.Module, layers: int, *, dtype: torch.dtype, init_from_backbone: bool
) -> nn.Module:
    """A new stack of ``layers`` layers of ``type(decoder)``, without token embeddings.

    It brings the architecture's rotary embedding, masks, attention backends, gradient
    checkpointing and final norm; call it with ``inputs_embeds`` and the ``attention_mask`` and
    ``position_ids`` that the decoder saw. No modelling code is copied.

    Args:
        decoder: ``backbone.get_decoder()``.
        layers: number of layers, >= 1.
        dtype: of the tower's weights.
        init_from_backbone: copy the decoder's LAST layers and its final norm. A tower longer than
            the decoder keeps its random weights in the layers before those.

    Returns:
        The tower, on the decoder's device, in eval mode, requiring gradients.
    """
    source = cast(Any, decoder)
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = _layer_types(config.layer_types, layers)
    # No embedding table: a one-word vocabulary, replaced by None below.
    config.vocab_size, config.pad_token_id = 1, None
    tower = type(source)._from_config(
        config, dtype=dtype, attn_implementation=source.config._attn_implementation
    )
    tower.set_input_embeddings(None)
    tower.to(source.device)
    if init_from_backbone:
        _copy_last_layers(source, tower)
    return cast(nn.Module, tower.requires_grad_(True).eval())


def _layer_types(types: list[str], layers: int) -> list[str]:
    """The kinds of the last ``layers`` layers; unknown kinds and missing ones are full."""
    kept = [t if t in _ATTENTION_TYPES else "full_attention" for t in types[-layers:]]
    return ["full_attention"] * (layers - len(kept)) + kept


@torch.no_grad()
def _copy_last_layers(decoder: Any, tower: Any) -> None:
    pairs = list(zip(reversed(decoder.layers), reversed(tower.layers), strict=False))
    pairs += [
        (module, getattr(tower, name))
        for name, module in decoder.named_children()
        if name not in ("layers", "embed_tokens") and isinstance(getattr(tower, name), nn.Module)
    ]
    for source, target in pairs:
        state = source.state_dict()
        for name, weight in target.state_dict().items():
            if name in state and state[name].shape == weight.shape:
                weight.copy_(state[name])


def final_norm(decoder: nn.Module) -> nn.Module:
    """The decoder's final norm: its last child named like a norm.

    Raises:
        ValueError: when the decoder has none.
    """
    norms = [m for name, m in decoder.named_children() if "norm" in name.lower() or name == "ln_f"]
    if not norms:
        raise ValueError(f"final_norm: {type(decoder).__name__} has no final norm")
    return norms[-1]
