"""Where the states of a rollout wait for their updates: device, host memory, or nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from latent_rl.decode.prompts import join_prompts
from latent_rl.models import backbone as bb
from latent_rl.train.replay.states import GroupStates, group_states

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["DeviceStore", "GroupRecipe", "HostStore", "RecomputeStore", "ReplayStore", "Wanted"]


@dataclass(frozen=True)
class Wanted:
    """Completions of one group, each with how many of its states are needed."""

    group: int
    members: tuple[int, ...]
    lengths: tuple[int, ...]


class ReplayStore(Protocol):
    """Keeps groups of states under their numbers."""

    @property
    def num_bytes(self) -> int:
        """Bytes it holds, wherever it holds them."""
        ...

    def fetch(self, wanted: Sequence[Wanted]) -> list[GroupStates]:
        """Return what is asked for, on the device, in that order."""
        ...

    def prefetch(self, wanted: Sequence[Wanted]) -> None:
        """Begin what the same call of `fetch` will wait for."""
        ...


@dataclass(frozen=True)
class DeviceStore:
    """States on the device itself."""

    groups: Mapping[int, GroupStates]

    @property
    def num_bytes(self) -> int:
        """See `ReplayStore`."""
        return sum(group.num_bytes for group in self.groups.values())

    def fetch(self, wanted: Sequence[Wanted]) -> list[GroupStates]:
        """See `ReplayStore`."""
        return [self.groups[w.group].take(w.members, w.lengths) for w in wanted]

    def prefetch(self, wanted: Sequence[Wanted]) -> None:
        """Nothing to wait for."""


class HostStore:
    """States in host memory, pinned where the device is a CUDA device.

    There `prefetch` copies on a stream of its own while the previous micro-batch computes.
    """

    def __init__(self, groups: Mapping[int, GroupStates], device: torch.device) -> None:
        self.groups, self.device = groups, device
        self._stream = _stream(device) if device.type == "cuda" else None
        self._coming: dict[Wanted, GroupStates] = {}

    @property
    def num_bytes(self) -> int:
        """See `ReplayStore`."""
        return sum(group.num_bytes for group in self.groups.values())

    def fetch(self, wanted: Sequence[Wanted]) -> list[GroupStates]:
        """See `ReplayStore`."""
        self.prefetch([w for w in wanted if w not in self._coming])
        found = [self._coming.pop(w) for w in wanted]
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for group in found:
                # The allocator must not hand the memory out while this stream still reads it.
                group.each(lambda tensor: _used_by(tensor, current))
        return found

    def prefetch(self, wanted: Sequence[Wanted]) -> None:
        """See `ReplayStore`."""
        with torch.cuda.stream(self._stream):
            for w in wanted:
                self._coming[w] = self.groups[w.group].take(w.members, w.lengths, self.device)


def _stream(device: torch.device) -> torch.cuda.Stream:
    make: Any = torch.cuda.Stream
    stream: torch.cuda.Stream = make(device)
    return stream


def _used_by(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor


@dataclass(frozen=True)
class GroupRecipe:
    """What the trunk needs to make a group's states again.

    inputs       the processor's tensors of the prompt alone, [1, P] and what goes with it
    completions  int64 [T_i], tokens of each completion
    """

    inputs: Mapping[str, Tensor]
    completions: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (*self.inputs.values(), *self.completions)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def lengths(self) -> tuple[int, ...]:
        """States of each completion."""
        return tuple(max(len(tokens) - 1, 0) for tokens in self.completions)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by name and a dict for JSON."""
        tensors = {f"inputs.{name}": value for name, value in self.inputs.items()}
        tensors |= {f"completions.{i:04d}": tokens for i, tokens in enumerate(self.completions)}
        return tensors, {"recipe": True}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor]) -> GroupRecipe:
        """The inverse of `state`."""
        inputs = {n.removeprefix("inputs."): t for n, t in tensors.items() if n[0] == "i"}
        names = sorted(name for name in tensors if name.startswith("completions."))
        return cls(inputs, tuple(tensors[name] for name in names))


class RecomputeStore:
    """No states: the trunk runs again, without gradients, over what an update asks for."""

    def __init__(
        self,
        groups: Mapping[int, GroupRecipe],
        model: LatentActionModel,
        dtype: torch.dtype | None,
    ) -> None:
        self.groups, self.model, self.dtype = groups, model, dtype

    @property
    def num_bytes(self) -> int:
        """See `ReplayStore`."""
        return sum(recipe.num_bytes for recipe in self.groups.values())

    @torch.no_grad()
    def fetch(self, wanted: Sequence[Wanted]) -> list[GroupStates]:
        """See `ReplayStore`; group by group, so that images of any size go together."""
        return [self._encode(self.groups[w.group], w) for w in wanted]

    def prefetch(self, wanted: Sequence[Wanted]) -> None:
        """The trunk runs when it is its turn."""

    def _encode(self, recipe: GroupRecipe, wanted: Wanted) -> GroupStates:
        model, device = self.model, self.model.device
        rows, longest = len(wanted.members), max(wanted.lengths)
        inputs = {name: value.to(device) for name, value in recipe.inputs.items()}
        joined = join_prompts([inputs] * rows, 0)
        if joined is None:
            raise RuntimeError("RecomputeStore: copies of one prompt do not stack")
        tokens = torch.zeros(rows, longest, dtype=torch.int64, device=device)
        for row, (member, length) in enumerate(zip(wanted.members, wanted.lengths, strict=True)):
            tokens[row, :length] = recipe.completions[member][:length].to(device)
        lengths = torch.tensor(wanted.lengths, device=device)
        keep = torch.arange(longest, device=device) < lengths[:, None]
        trace = model.encode(bb.extend_inputs(joined, tokens, keep))
        return group_states(
            model,
            trace,
            [length + 1 for length in wanted.lengths],
            group_size=rows,
            dtype=self.dtype,
        )[0]
