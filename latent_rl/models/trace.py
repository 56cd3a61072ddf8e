"""A trace: what one pass of the frozen trunk leaves for everything that comes after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOWER_KWARGS = ("attention_mask", "position_ids")


@dataclass(frozen=True)
class Trace:
    """States of a batch and the keyword arguments a tower needs to read them.

    Attributes:
        hidden: [B, L, H], the decoder's output after its final norm (e_t), backbone's dtype.
        tower_kwargs: ``attention_mask`` and ``position_ids`` as the decoder saw them.
        keep_mask: bool [B, L], True at real (not padding) positions.
        text_only: bool [B], True for rows without an image or video placeholder.
    """

    hidden: Tensor
    tower_kwargs: Mapping[str, Any]
    keep_mask: Tensor
    text_only: Tensor

    @property
    def batch_size(self) -> int:
        """B."""
        return self.hidden.shape[0]

    def select(self, rows: Tensor) -> Trace:
        """The given rows: int64 indices [R] or a bool mask [B]."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        batch = self.batch_size
        kwargs = {
            name: _map_batch(value, _batch_axis(name, value), batch, rows)
            for name, value in self.tower_kwargs.items()
        }
        return Trace(self.hidden[rows], kwargs, self.keep_mask[rows], self.text_only[rows])

    def to(self, device: torch.device | str) -> Trace:
        """The same trace on a device."""
        return self._each(lambda t: t.to(device))

    def detach(self) -> Trace:
        """The same trace cut from the graph."""
        return self._each(lambda t: t.detach())

    def _each(self, apply: Callable[[Tensor], Tensor]) -> Trace:
        kwargs = {name: _apply(value, apply) for name, value in self.tower_kwargs.items()}
        return Trace(apply(self.hidden), kwargs, apply(self.keep_mask), apply(self.text_only))


def _apply(value: Any, apply: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return apply(value)
    if isinstance(value, Mapping):
        return {name: _apply(inner, apply) for name, inner in value.items()}
    return value


def _batch_axis(name: str, value: Any) -> int:
    # Multimodal rotary positions are [3 or 4, B, L]; masks and plain positions start with B.
    return 1 if name == "position_ids" and isinstance(value, Tensor) and value.ndim == 3 else 0


def _map_batch(value: Any, axis: int, batch: int, rows: Tensor) -> Any:
    if isinstance(value, Mapping):
        return {name: _map_batch(inner, axis, batch, rows) for name, inner in value.items()}
    if not isinstance(value, Tensor):
        if value is None:
            return None
        raise TypeError(f"Trace.select: cannot select rows of a {type(value).__name__}")
    if value.shape[axis] == 1 and batch != 1:
        return value
    return value.index_select(axis, rows.to(value.device))
