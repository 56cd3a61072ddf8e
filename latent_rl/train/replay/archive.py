"""The states of a whole rollout, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latent_rl.train.replay.states import GroupStates
from latent_rl.train.replay.stores import (
    DeviceStore,
    GroupRecipe,
    HostStore,
    RecomputeStore,
    ReplayStore,
    Wanted,
)

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["KeptGroup", "ReplayStates"]

KeptGroup = GroupStates | GroupRecipe


@dataclass(frozen=True)
class ReplayStates:
    """Groups of equal size, each in one of the stores.

    groups      what was kept of each group, in the order of the rows
    stores      by the number of a group
    group_size  completions per group
    dtype       of recomputed states; None is the model's
    """

    groups: tuple[KeptGroup, ...]
    stores: tuple[ReplayStore, ...]
    group_size: int
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls,
        groups: Sequence[KeptGroup],
        model: LatentActionModel,
        dtype: torch.dtype | None = None,
    ) -> ReplayStates:
        """Groups as the rollout left them: states on the device, on the host, or recipes."""
        device = model.device
        here, host, recipes = {}, {}, {}
        for number, group in enumerate(groups):
            if isinstance(group, GroupRecipe):
                recipes[number] = group
            elif group.hidden.device == device and not group.spilled:
                here[number] = group
            else:
                host[number] = group
        stores: list[ReplayStore] = [
            DeviceStore(here),
            HostStore(host, device),
            RecomputeStore(recipes, model, dtype),
        ]
        where = [stores[0 if n in here else 1 if n in host else 2] for n in range(len(groups))]
        return cls(tuple(groups), tuple(where), len(groups[0].lengths), dtype)

    def fetch(
        self, rows: Sequence[int], needed: Sequence[int | None]
    ) -> tuple[list[int], list[GroupStates]]:
        """Return states of rows, prompts once per group.

        Args:
            rows: numbers of completions.
            needed: states of each; None leaves a row out. One row is kept in any case, so that
                there is something to run a tower on.

        Returns:
            For every completion of the result, in order, its place in `rows`; and the groups.
        """
        order, wanted = self._wanted(rows, needed)
        found: dict[Wanted, GroupStates] = {}
        for store, share in self._by_store(wanted):
            found.update(zip(share, store.fetch(share), strict=True))
        return order, [found[w] for w in wanted]

    def prefetch(self, rows: Sequence[int], needed: Sequence[int | None]) -> None:
        """Begin what the same call of `fetch` will wait for."""
        for store, share in self._by_store(self._wanted(rows, needed)[1]):
            store.prefetch(share)

    def _wanted(
        self, rows: Sequence[int], needed: Sequence[int | None]
    ) -> tuple[list[int], list[Wanted]]:
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            if needed[place] is not None:
                places.setdefault(row // self.group_size, []).append(place)
        if not places:
            places[rows[0] // self.group_size] = [0]
        order = [place for group in places.values() for place in group]
        wanted = [
            Wanted(
                group,
                tuple(rows[place] % self.group_size for place in found),
                tuple(needed[place] or 0 for place in found),
            )
            for group, found in places.items()
        ]
        return order, wanted

    def _by_store(self, wanted: Sequence[Wanted]) -> list[tuple[ReplayStore, list[Wanted]]]:
        shares: dict[int, tuple[ReplayStore, list[Wanted]]] = {}
        for w in wanted:
            store = self.stores[w.group]
            shares.setdefault(id(store), (store, []))[1].append(w)
        return list(shares.values())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by name and a dict for JSON."""
        tensors: dict[str, Tensor] = {}
        metas: list[dict[str, Any]] = []
        for number, group in enumerate(self.groups):
            own, meta = group.state()
            tensors |= {f"{number}.{name}": tensor for name, tensor in own.items()}
            metas.append(meta)
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return tensors, {"groups": metas, "dtype": dtype}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], model: LatentActionModel
    ) -> ReplayStates:
        """The inverse of `state`; what was on the device goes there again."""
        groups: list[KeptGroup] = []
        for number, one in enumerate(meta["groups"]):
            prefix = f"{number}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if one.get("recipe"):
                groups.append(GroupRecipe.from_state(own))
            else:
                group = GroupStates.from_state(own, one)
                if not group.spilled:
                    group = group.to(model.device)
                elif model.device.type == "cuda":
                    group = group.each(Tensor.pin_memory)
                groups.append(group)
        dtype = None if meta["dtype"] is None else getattr(torch, meta["dtype"])
        return cls.of(groups, model, dtype)
