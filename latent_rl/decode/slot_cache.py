"""Static key-value storage: prompts that rows share, and a slot of its own for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = [
    "CachedRow",
    "LayerShape",
    "SlotLayer",
    "SlotLayout",
    "SlotStore",
    "SlotWindow",
    "layer_shapes",
]


@dataclass(frozen=True)
class LayerShape:
    """Heads and head width of one attention layer's keys and values."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers per cached position."""
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class SlotLayout:
    """How a layer's storage of S positions is divided: prompts first, then slots.

    Attributes:
        prompts: prompts held at once.
        prompt_length: positions of each.
        slots: rows decoded at once.
        slot_length: positions of each slot, for what a row says itself.
    """

    prompts: int
    prompt_length: int
    slots: int
    slot_length: int

    @property
    def positions(self) -> int:
        """S."""
        return self.prompts * self.prompt_length + self.slots * self.slot_length

    @property
    def longest(self) -> int:
        """Positions a row can see at most."""
        return self.prompt_length + self.slot_length

    def prompt_at(self, prompt: int) -> int:
        """First position of a prompt's place."""
        return prompt * self.prompt_length

    def slot_at(self, slot: int) -> int:
        """First position of a slot."""
        return self.prompts * self.prompt_length + slot * self.slot_length

    def serves(self, other: SlotLayout) -> bool:
        """Whether it has room for all that the other has."""
        return all(
            mine >= theirs
            for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )


@dataclass
class SlotWindow:
    """What the current step works on, shared by all layers.

    Attributes:
        bound: positions that a row may see; later ones are not even looked for.
        index: int64 [n], where each row's new key goes.
    """

    bound: int
    index: Tensor


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, [S, heads, width]: one new position per row and step.

    What may be seen is the mask's business, so sliding-window layers are stored like full ones.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, window: SlotWindow) -> None:
        """Views of storage made by :class:`SlotStore`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self._window = keys, values, window
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the storage exists."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [n, heads, 1, width]; return a view [1, heads, S, width] of the whole storage."""
        w = self._window
        return (
            _put(cast(Tensor, self.keys), key_states, w),
            _put(cast(Tensor, self.values), value_states, w),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self._window.bound, 0

    def get_seq_length(self) -> int:
        """The bound; rows know their own lengths."""
        return self._window.bound

    def get_max_length(self) -> int:
        """Positions of the storage."""
        return cast(Tensor, self.keys).shape[0]

    # The name before transformers 5.2x.
    get_max_cache_shape = get_max_length


def _put(store: Tensor, new: Tensor, window: SlotWindow) -> Tensor:
    store.index_copy_(0, window.index, new[:, :, 0].to(store.dtype))
    return store.transpose(0, 1)[None]


class CachedRow(NamedTuple):
    """One row of a cache, from position ``pad`` on."""

    cache: Cache
    row: int
    pad: int


class SlotStore:
    """The storage of a stack of layers and the cache object to hand to its forward."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        layout: SlotLayout,
        window: SlotWindow,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate it, as zeros."""
        self._layers = [
            SlotLayer(
                torch.zeros(layout.positions, s.heads, s.key_dim, dtype=dtype, device=device),
                torch.zeros(layout.positions, s.heads, s.value_dim, dtype=dtype, device=device),
                window,
            )
            for s in shapes
        ]
        self.cache = Cache(layers=list(self._layers))
        self.layout = layout

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [cast(Tensor, t) for layer in self._layers for t in (layer.keys, layer.values)]

    def load(self, given: CachedRow, prompt: int) -> None:
        """Copy a prompt's keys and values to a prompt's place, for all its completions."""
        at = self.layout.prompt_at(prompt)
        for layer, read in zip(self._layers, given.cache.layers, strict=True):
            source = cast(CacheLayerMixin, read)
            for mine, theirs in ((layer.keys, source.keys), (layer.values, source.values)):
                positions = cast(Tensor, theirs)[given.row, :, given.pad :].transpose(0, 1)
                cast(Tensor, mine)[at : at + positions.shape[0]] = positions

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot to another."""
        here, there = self.layout.slot_at(source), self.layout.slot_at(target)
        for tensor in self._tensors():
            tensor[there : there + length] = tensor[here : here + length]


def layer_shapes(stack: nn.Module) -> list[LayerShape]:
    """Key and value sizes of a decoder stack's layers, read from its config.

    Raises:
        ValueError: for layers of another kind than full or sliding attention.
    """
    config = cast(Any, stack).config
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"Decoder: layers must be full or sliding attention, got {kind!r}; use generate()"
            )
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [LayerShape(heads, int(width), int(width))] * int(config.num_hidden_layers)
