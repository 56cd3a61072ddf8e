"""A micro-batch for the tower: its real positions end to end, or padded rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from latent_rl.train.replay.attention import Block, Packing, Piece
from latent_rl.train.replay.states import GroupStates

__all__ = ["LAYOUTS", "BatchStates", "Layout", "PackedLayout", "PaddedLayout"]


@dataclass(frozen=True)
class BatchStates:
    """Input of a tower and where its actions are.

    hidden        [b, L, H]
    tower_kwargs  what the tower is called with beside it
    action        int64 [M], positions of the M kept actions in the flattened b * L
    """

    hidden: Tensor
    tower_kwargs: Mapping[str, Any]
    action: Tensor


class Layout(Protocol):
    """How groups become one input of the tower."""

    @property
    def name(self) -> str:
        """As in `replay_layout`."""
        ...

    def lay_out(self, groups: Sequence[GroupStates], kept: Sequence[Sequence[int]]) -> BatchStates:
        """Return the tower's input.

        Args:
            groups: the states, each cut to what is needed.
            kept: by completion, in the order of the groups, the steps whose action is kept.
        """
        ...


@dataclass(frozen=True)
class PackedLayout:
    """All real positions in one row: prompts first, then completions.

    A prompt stands there once for all its completions, so tower and gradients pass over it once.
    Attention needs `packing`, see `latent_rl.train.replay.attention`.

    area_slack  positions squared by which padding inside attention may exceed what is needed,
                before rows of different lengths are attended to in separate calls
    """

    area_slack: int = 1 << 15
    name: str = "packed"

    def lay_out(self, groups: Sequence[GroupStates], kept: Sequence[Sequence[int]]) -> BatchStates:
        """See `Layout`."""
        device = groups[0].hidden.device
        prompts, rows = _pieces(groups)
        action = []
        for row, steps in zip(rows, kept, strict=True):
            last = row.prompt_begin + row.prompt - 1
            action += [row.begin + step - 1 if step else last for step in steps]
        buckets = [*self._buckets(prompts), *self._buckets([row for row in rows if row.length])]
        blocks = [Block.of(bucket, device) for bucket in buckets]
        return BatchStates(
            hidden=_prompts_first([(group.hidden, group.prompt) for group in groups], 0)[None],
            tower_kwargs={
                # Four axes: transformers hands it through and builds no mask of its own.
                "attention_mask": torch.empty(1, 1, 1, 0, device=device),
                "position_ids": _position_ids(groups),
                "packing": Packing.of(blocks, (*prompts, *rows)),
            },
            action=torch.tensor(action, dtype=torch.int64, device=device),
        )

    def _buckets(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """Pieces of similar size together: few calls matter more than a little padding."""
        bucket: list[Piece] = []
        needed = 0
        for piece in sorted(pieces, key=lambda piece: piece.size):
            grown = [*bucket, piece]
            queries, keys = piece.size
            padded = len(grown) * queries * max(p.size[1] for p in grown)
            if bucket and padded > 1.25 * (needed + queries * keys) + self.area_slack:
                yield bucket
                grown, needed = [piece], 0
            bucket, needed = grown, needed + queries * keys
        if bucket:
            yield bucket


@dataclass(frozen=True)
class PaddedLayout:
    """One row per completion, its prompt in front, padded on the right to the longest.

    The tower's own attention serves. Ready-made masks (Gemma3) are refused.
    """

    name: str = "padded"

    def lay_out(self, groups: Sequence[GroupStates], kept: Sequence[Sequence[int]]) -> BatchStates:
        """See `Layout`.

        Raises:
            ValueError: for groups with ready-made masks.
        """
        if any(group.masks for group in groups):
            raise ValueError(
                "PaddedLayout: this decoder prepares its own attention masks; "
                'set replay_layout="packed"'
            )
        position_ids = _position_ids(groups, flat=False)
        width = max(g.prompt + n for g in groups for n in g.lengths)
        hidden: list[Tensor] = []
        positions: list[Tensor] = []
        action: list[int] = []
        lengths: list[int] = []
        for group, ids in zip(groups, position_ids, strict=True):
            for begin, length in zip(group.offsets, group.lengths, strict=True):
                row = len(hidden)
                steps = [row * width + group.prompt - 1 + step for step in kept[row]]
                action += steps
                lengths.append(group.prompt + length)
                pad = width - lengths[-1]
                parts = [slice(0, group.prompt), slice(begin, begin + length)]
                states = torch.cat([group.hidden[part] for part in parts])
                hidden.append(torch.nn.functional.pad(states, (0, 0, 0, pad)))
                places = torch.cat([ids[:, part] for part in parts], 1)
                positions.append(torch.nn.functional.pad(places, (0, pad)))
        device = groups[0].hidden.device
        real = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
        stacked = torch.stack(positions, 1)
        return BatchStates(
            hidden=torch.stack(hidden),
            tower_kwargs={
                "attention_mask": real.long(),
                "position_ids": stacked if len(stacked) > 1 else stacked[0],
            },
            action=torch.tensor(action, dtype=torch.int64, device=device),
        )


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (PackedLayout(), PaddedLayout())}


def _pieces(groups: Sequence[GroupStates]) -> tuple[list[Piece], list[Piece]]:
    """Prompts, and completions in the order of the groups."""
    prompts, rows = [], []
    prompt_begin, begin = 0, sum(group.prompt for group in groups)
    for group in groups:
        prompts.append(Piece(prompt_begin, group.prompt, masks=group.masks))
        for length in group.lengths:
            rows.append(Piece(prompt_begin, group.prompt, begin, length))
            begin += length
        prompt_begin += group.prompt
    return prompts, rows


def _prompts_first(parts: Sequence[tuple[Tensor, int]], axis: int) -> Tensor:
    prompts = [tensor.narrow(axis, 0, prompt) for tensor, prompt in parts]
    rest = [t.narrow(axis, prompt, t.shape[axis] - prompt) for t, prompt in parts]
    return torch.cat([*prompts, *rest], axis)


def _position_ids(groups: Sequence[GroupStates], flat: bool = True) -> Any:
    """Position ids with as many axes as any group has: [1, N] or [A, 1, N] packed, else by group.

    A group of text alone may have one axis where images have three; they then agree.
    """
    axes = max(group.positions.shape[0] for group in groups)
    given = [group.positions.expand(axes, -1) for group in groups]
    if not flat:
        return given
    ids = _prompts_first([(p, g.prompt) for p, g in zip(given, groups, strict=True)], 1)
    return ids if axes == 1 else ids[:, None]
