"""Weights in autocast's dtype: cast once a call, where autocast would cast them at every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from latent_rl.models import LatentActionModel
from latent_rl.nn.merge import MergeBlock
from latent_rl.nn.precision import autocast_dtype

__all__ = ["WeightCasts", "casts_bytes"]

Place = tuple[nn.Module, str]


def _places(model: LatentActionModel) -> list[Place]:
    """Float32 weights that autocast would cast, of the modules a step runs.

    Those of products in the policy's layers and in the merge. The policy's head is left as it is:
    the policy takes its states in the head's dtype.
    """
    latent = model.latent
    found: list[Place] = []
    for module in (*latent.policy.tower.modules(), *latent.merge.modules()):
        if type(module) is nn.Linear or isinstance(module, MergeBlock):
            found += [
                (module, name)
                for name, weight in module.named_parameters(recurse=False)
                # Sharded ones (DTensors) are autocast's own business.
                if type(weight) is nn.Parameter and weight.dtype == torch.float32
            ]
    return found


def casts_bytes(model: LatentActionModel) -> int:
    """Bytes of the copies under the autocast of now; 0 without one."""
    # Plans are made of models without memory too.
    if not torch.amp.is_autocast_available(model.device.type):
        return 0
    dtype = autocast_dtype(model.device)
    if dtype is None:
        return 0
    count = sum(int(getattr(module, name).numel()) for module, name in _places(model))
    return count * dtype.itemsize


class WeightCasts:
    """Copies of a model's float32 weights in one dtype, at addresses that stay.

    A step under autocast then reads half the bytes and casts none; captured in a graph it would
    otherwise read the float32 weights, write the copies and read those, at every step. The numbers
    are the same.
    """

    def __init__(self, model: LatentActionModel, dtype: torch.dtype) -> None:
        """Allocate the copies."""
        self.dtype = dtype
        self._held = _places(model)
        self._copies = [
            nn.Parameter(torch.empty_like(getattr(m, name), dtype=dtype), requires_grad=False)
            for m, name in self._held
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies)

    def fits(self, model: LatentActionModel) -> bool:
        """Whether the model's weights are still those copied, maybe with other values."""
        now = _places(model)
        return len(now) == len(self._held) and all(
            mine[0] is theirs[0] and mine[1] == theirs[1]
            for mine, theirs in zip(self._held, now, strict=True)
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights' values of now."""
        for (module, name), copy in zip(self._held, self._copies, strict=True):
            copy.copy_(getattr(module, name))

    @contextmanager
    def use(self) -> Iterator[None]:
        """Put the copies in the weights' place until the block ends."""
        weights = [module._parameters[name] for module, name in self._held]
        try:
            for (module, name), copy in zip(self._held, self._copies, strict=True):
                module._parameters[name] = copy
            yield
        finally:
            for (module, name), weight in zip(self._held, weights, strict=True):
                module._parameters[name] = weight
