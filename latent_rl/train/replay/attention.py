"""Attention over packed rows: completions see their prompt and themselves, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["NAME", "Block", "Packing", "Piece", "packed_attention", "prepare_tower", "why_not"]

NAME = "latent_rl_packed"
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Piece:
    """A prompt over itself (length 0), or a completion over its prompt and itself.

    prompt_begin, prompt  where the prompt's positions begin in the packed row, and how many
    begin, length         the same of the completion
    masks                 bool [prompt, prompt] by kind of layer; empty means causal
    """

    prompt_begin: int
    prompt: int
    begin: int = 0
    length: int = 0
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Queries and keys."""
        return (self.length, self.prompt + self.length) if self.length else (self.prompt,) * 2


@dataclass(frozen=True)
class Block:
    """b pieces of one kind attended to in one call, padded to Q queries and S keys.

    shape         b, Q, S
    queries       int64 [b * Q], packed positions of the queries; padding repeats a real one
    keys          int64 [b * S], the same of the keys
    query_places  int64 [b, Q, 1], a query's place in its own sequence
    real          int64 [n], which of the b * Q are real
    square        pieces are prompts: as many queries as keys
    masks         bool [b, 1, Q, S] by kind of layer, where order and window do not say it
    """

    shape: tuple[int, int, int]
    queries: Tensor
    keys: Tensor
    query_places: Tensor
    real: Tensor
    square: bool
    masks: Mapping[str, Tensor]
    _cache: dict[int | None, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, pieces: Sequence[Piece], device: torch.device) -> Block:
        """Pieces are all prompts or all completions."""
        square = pieces[0].length == 0
        q, s = (max(piece.size[axis] for piece in pieces) for axis in (0, 1))
        queries: list[int] = []
        keys: list[int] = []
        real: list[int] = []
        places: list[int] = []
        for number, piece in enumerate(pieces):
            own = range(piece.prompt_begin, piece.prompt_begin + piece.prompt)
            new = range(piece.begin, piece.begin + piece.length)
            asked = own if square else new
            queries += [*asked, *[asked[0]] * (q - len(asked))]
            keys += [*own, *new, *[own[0]] * (s - len(own) - len(new))]
            real += range(number * q, number * q + len(asked))
            places.append(0 if square else piece.prompt)
        begins = torch.tensor(places, device=device)[:, None]
        return cls(
            shape=(len(pieces), q, s),
            queries=torch.tensor(queries, device=device),
            keys=torch.tensor(keys, device=device),
            query_places=(begins + torch.arange(q, device=device))[:, :, None],
            real=torch.tensor(real, device=device),
            square=square,
            masks=_padded_masks(pieces, q, device),
        )

    def mask(self, window: int | None) -> Tensor | None:
        """bool [b, 1, Q, S]; None when plain causal attention says it all."""
        if window not in self._cache:
            self._cache[window] = self._mask(window)
        return self._cache[window]

    def _mask(self, window: int | None) -> Tensor | None:
        kind = FULL if window is None else SLIDING
        if kind in self.masks:
            return self.masks[kind]
        if self.square and (window is None or window >= self.shape[2]):
            return None
        # What pads a sequence stands behind it: no real query sees it, and it sees something.
        places = torch.arange(self.shape[2], device=self.queries.device)
        seen = places <= self.query_places
        if window is not None:
            seen = seen & (places > self.query_places - window)
        return seen[:, None]


def _padded_masks(pieces: Sequence[Piece], q: int, device: torch.device) -> dict[str, Tensor]:
    masks = {}
    for kind in {kind for piece in pieces for kind in piece.masks}:
        whole = torch.ones(q, q, dtype=torch.bool, device=device).tril().repeat(len(pieces), 1, 1)
        for row, piece in enumerate(pieces):
            if kind in piece.masks:
                whole[row, : piece.prompt, : piece.prompt] = piece.masks[kind]
        masks[kind] = whole[:, None]
    return masks


@dataclass(frozen=True)
class Packing:
    """How the N positions of a packed row belong together.

    blocks   whose real queries are all N positions
    restore  int64 [N], where each position's output is among the blocks' queries end to end
    pieces   what the blocks were made of, prompts first, in packed order
    """

    blocks: tuple[Block, ...]
    restore: Tensor
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, blocks: Sequence[Block], pieces: Sequence[Piece]) -> Packing:
        """Blocks of these pieces."""
        queries = [block.queries[block.real] for block in blocks]
        restore = torch.empty_like(torch.cat(queries))
        begin = 0
        for asked, block in zip(queries, blocks, strict=True):
            restore[asked] = block.real + begin
            begin += len(block.queries)
        return cls(tuple(blocks), restore, tuple(pieces))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Exact attention within each sequence, under the signature of transformers' functions.

    Args:
        module: the attention layer (unused).
        query: [1, heads, N, D].
        key, value: [1, key heads, N, D].
        attention_mask: ignored; `packing` says who sees whom.
        dropout: of the weights.
        scaling: of the products.
        sliding_window: keys a query sees, itself included.
        packing: of the N positions.

    Returns:
        [1, N, heads, D] and None.

    Raises:
        ValueError: for variants of attention this is not: soft-capped scores, sinks.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f'replay: packed attention with {name} is not supported; set replay_layout="padded"'
            )
    if packing is None:
        raise ValueError("replay: packed attention was called without a packing")
    shared = query.shape[1] // key.shape[1]
    # [N, heads, D]: rows are gathered whole.
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    outputs = []
    for block in packing.blocks:
        b, q, s = block.shape
        asked = _gather(query, block.queries, b, q)
        mask = block.mask(sliding_window)
        out = scaled_dot_product_attention(
            asked,
            _gather(key, block.keys, b, s),
            _gather(value, block.keys, b, s),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=shared > 1,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, packing.restore)[None], None


def _gather(states: Tensor, index: Tensor, rows: int, length: int) -> Tensor:
    """[N, heads, D] -> [rows, heads, length, D]."""
    gathered = states.index_select(0, index)
    return gathered.view(rows, length, *gathered.shape[1:]).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)


class _WithPackedAttention:
    """Hooks of an attention module: packed attention serves when it is called with a packing.

    They run inside activation checkpointing as well, so a recomputed layer does the same again.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.previous: list[Any] = []

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.previous.append(self.config._attn_implementation)
        if "packing" in kwargs:
            self.config._attn_implementation = NAME

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.config._attn_implementation = self.previous.pop()


def prepare_tower(tower: nn.Module) -> None:
    """Let a tower's layers understand `packing`; without one they do what they always did."""
    if getattr(tower, "_latent_rl_packs", False):
        return
    hooks = _WithPackedAttention(cast(Any, tower).config)
    for layer in cast(Any, tower).layers:
        layer.self_attn.register_forward_pre_hook(hooks.before, with_kwargs=True)
        layer.self_attn.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)
    cast(Any, tower)._latent_rl_packs = True


def why_not(tower: nn.Module) -> str | None:
    """Why a tower cannot read packed rows, or None when it can."""
    layers, config = getattr(tower, "layers", None), cast(Any, tower).config
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        return f"{type(tower).__name__} has no layers with self_attn"
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if kinds:
        return f"its layers are of kinds {sorted(kinds)}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps attention scores"
    return None
