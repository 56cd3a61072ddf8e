"""Static key-value storage where every row stands at a position of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["CachedRow", "LayerShape", "SlotLayer", "SlotStore", "SlotWindow", "layer_shapes"]


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


@dataclass
class SlotWindow:
    """The part of the slots that the current step works on, shared by all layers.

    Attributes:
        rows: n, the first n slots.
        bound: cached positions that may be visible; later ones are not even read.
        index: int64 [n], where each row's new key goes in the flattened [slots * C] storage.
    """

    rows: int
    bound: int
    index: Tensor


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, [slots, C, heads, width]: one new position per row and step.

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
        """Store [n, heads, 1, width]; return views [n, heads, bound, width] of all positions."""
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
        """Positions per slot."""
        return cast(Tensor, self.keys).shape[1]

    # The name before transformers 5.2x.
    get_max_cache_shape = get_max_length


def _put(store: Tensor, new: Tensor, window: SlotWindow) -> Tensor:
    flat = store.view(-1, *store.shape[2:])
    flat.index_copy_(0, window.index, new[:, :, 0].to(store.dtype))
    return store[: window.rows, : window.bound].transpose(1, 2)


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
        slots: int,
        length: int,
        window: SlotWindow,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Zeros: a masked key must be finite, for its value is multiplied by an exact zero."""
        self._layers = [
            SlotLayer(
                torch.zeros(slots, length, s.heads, s.key_dim, dtype=dtype, device=device),
                torch.zeros(slots, length, s.heads, s.value_dim, dtype=dtype, device=device),
                window,
            )
            for s in shapes
        ]
        self.cache = Cache(layers=list(self._layers))
        self.length = length

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [cast(Tensor, t) for layer in self._layers for t in (layer.keys, layer.values)]

    def load(self, prompt: CachedRow, slots: slice) -> None:
        """Copy one prompt's keys and values to every slot of a range."""
        for layer, given in zip(self._layers, prompt.cache.layers, strict=True):
            source = cast(CacheLayerMixin, given)
            for mine, theirs in ((layer.keys, source.keys), (layer.values, source.values)):
                positions = cast(Tensor, theirs)[prompt.row, :, prompt.pad :].transpose(0, 1)
                cast(Tensor, mine)[slots, : positions.shape[0]] = positions

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot to another."""
        for tensor in self._tensors():
            tensor[target, :length] = tensor[source, :length]


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
