"""How much memory a replay may take, what it will take, and what happens beyond."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from latent_rl.train.replay.archive import KeptGroup
from latent_rl.train.replay.states import GroupStates

__all__ = ["SPILLS", "Call", "ReplayMemory", "Shapes", "held_bytes"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shapes:
    """Sizes of a rollout before it is made.

    groups, group_size  P prompts with G completions each
    prompt_tokens       of the longest prompt
    new_tokens          T at most
    hidden              H
    itemsize            bytes per number: the larger of the rollout's and the replay's
    """

    groups: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    hidden: int
    itemsize: int

    @property
    def group_bytes(self) -> int:
        """What a group takes at most while it is decoded: every row with its prompt, padded."""
        positions = self.prompt_tokens + self.new_tokens - 1
        return self.group_size * positions * self.hidden * self.itemsize

    @property
    def kept_bytes(self) -> int:
        """What all groups take at most once they are kept, each prompt once."""
        positions = self.prompt_tokens + self.group_size * (self.new_tokens - 1)
        return self.groups * positions * self.hidden * self.itemsize


@dataclass(frozen=True)
class Call:
    """Groups [begin, end) decoded in one call; `states`: whether theirs are kept."""

    begin: int
    end: int
    states: bool = True


class Spill(Protocol):
    """What happens to the groups for which the device has no room."""

    @property
    def where(self) -> str:
        """Of the log line."""
        ...

    def calls(self, groups: int, room: int) -> list[Call]:
        """Cut a rollout whose states fit for `room` groups at a time."""
        ...

    def place(self, group: GroupStates) -> GroupStates:
        """Put away the states of a group that did not fit."""
        ...


@dataclass(frozen=True)
class SpillToHost:
    """Their states wait in host memory."""

    where: str = "to host memory"

    def calls(self, groups: int, room: int) -> list[Call]:
        """See `Spill`: one call after the other, each moved away before the next."""
        return [Call(at, min(at + room, groups)) for at in range(0, groups, room)]

    def place(self, group: GroupStates) -> GroupStates:
        """See `Spill`."""
        return group.spill()


@dataclass(frozen=True)
class SpillToRecompute:
    """They are decoded without keeping states, and the trunk runs again in every update."""

    where: str = "will be recomputed"

    def calls(self, groups: int, room: int) -> list[Call]:
        """See `Spill`."""
        return [Call(0, room), Call(room, groups, states=False)]

    def place(self, group: GroupStates) -> GroupStates:
        """See `Spill`: decoded states of a group are here already, and fit beside a call's."""
        return group


SPILLS: dict[str, Spill] = {"host": SpillToHost(), "recompute": SpillToRecompute()}


@dataclass(frozen=True)
class ReplayMemory:
    """The budget of a process for states between a rollout and its last update.

    While a rollout is made, the decoder's own buffer of the same size at most stands beside it.

    budget_bytes  None is unlimited
    spill         what happens beyond it
    dtype         to keep states in; None keeps the rollout's
    """

    budget_bytes: int | None = None
    spill: Spill = SPILLS["host"]
    dtype: torch.dtype | None = None

    def calls(self, shapes: Shapes, held: int) -> list[Call]:
        """Cut a rollout into calls that fit, `held` bytes being taken already; log the forecast.

        Raises:
            ValueError: when not even one group fits, saying what to lower.
        """
        everything = [Call(0, shapes.groups)]
        if self.budget_bytes is None:
            return everything
        if shapes.group_bytes > self.budget_bytes:
            raise ValueError(
                f"replay_memory_gb: one group needs {_gib(shapes.group_bytes)} "
                f"({shapes.group_size} completions x ({shapes.prompt_tokens} prompt + "
                f"{shapes.new_tokens} - 1 new tokens) x {shapes.hidden} x {shapes.itemsize} "
                f"bytes), the budget is {_gib(self.budget_bytes)}; lower num_generations, "
                "max_completion_length or the prompts' images, or raise replay_memory_gb"
            )
        room = max(0, self.budget_bytes - held) // shapes.group_bytes
        if room >= shapes.groups:
            return everything
        # States already held leave less room, but a call's own buffer may be of the full size.
        return self.spill.calls(shapes.groups, max(1, room))

    def place(self, groups: Sequence[GroupStates], held: int) -> list[GroupStates]:
        """Keep groups on the device as long as they fit beside `held` bytes, spill the rest."""
        placed = []
        for group in groups:
            fits = self.budget_bytes is None or held + group.num_bytes <= self.budget_bytes
            placed.append(group if fits else self.spill.place(group))
            held += 0 if placed[-1].spilled else group.num_bytes
        return placed

    def report(self, groups: Sequence[KeptGroup], forecast: int) -> dict[str, float]:
        """Log where the rows of a rollout went; return the same as metrics."""
        there = sum(len(group.lengths) for group in groups if not _is_here(group))
        rows = sum(len(group.lengths) for group in groups)
        here_bytes = held_bytes(groups)
        budget = "unlimited" if self.budget_bytes is None else _gib(self.budget_bytes)
        logger.log(
            logging.INFO if there else logging.DEBUG,
            "replay: %d of %d rows on the device (%s; forecast for all at most %s, budget %s)%s",
            rows - there,
            rows,
            _gib(here_bytes),
            _gib(forecast),
            budget,
            f", {there} {self.spill.where}" if there else "",
        )
        return {"replay/device_gb": here_bytes / 1e9, "replay/spilled_rows": float(there)}


def held_bytes(groups: Sequence[KeptGroup]) -> int:
    """Bytes of states on the device."""
    return sum(group.num_bytes for group in groups if _is_here(group))


def _is_here(group: KeptGroup) -> bool:
    return isinstance(group, GroupStates) and not group.spilled


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
