"""A micro-batch for the tower: its real positions end to end, or padded rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from latent_rl.train.replay.blocks import Block, Packing, Piece
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
        places = _places(groups)
        completions = [row for place in places for row in place.completions]
        action = []
        for (last, begin, _), steps in zip(completions, kept, strict=True):
            action += [begin + step - 1 if step else last for step in steps]

        def blocks(pieces: Sequence[Piece]) -> list[Block]:
            return [Block.of(bucket, device) for bucket in self._buckets(pieces)]

        rows = blocks([piece for place in places for piece in place.rows()])
        # Prompts end up in no output but their last position's: its action is everyone's first.
        bodies = sum(group.prompt - 1 for group in groups)
        final = Packing.of([*blocks([p.last() for p in places]), *rows], bodies)
        packing = Packing.of([*blocks([p.whole() for p in places]), *rows], 0, final)
        return BatchStates(
            hidden=_in_order([(group.hidden, group.prompt) for group in groups], 0)[None],
            tower_kwargs={
                # Four axes: transformers hands it through and builds no mask of its own.
                "attention_mask": torch.empty(1, 1, 1, 0, device=device),
                "position_ids": _position_ids(groups),
                "packing": packing,
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


@dataclass(frozen=True)
class _Places:
    """Where a group is in the packed row: prompts without their last positions come first, then
    those, then completions."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, int, int], ...]
    masks: Mapping[str, Tensor]

    def whole(self) -> Piece:
        """The prompt over itself."""
        return Piece(self.prompt, self.prompt, 0, self.masks)

    def last(self) -> Piece:
        """The prompt's last position over the prompt."""
        masks = {kind: mask[-1:] for kind, mask in self.masks.items()}
        return Piece(self.prompt[-1:], self.prompt, len(self.prompt) - 1, masks)

    def rows(self) -> list[Piece]:
        """Completions over the prompt and themselves."""
        return [
            Piece(own, (*self.prompt, *own), len(self.prompt))
            for _, begin, length in self.completions
            if (own := range(begin, begin + length))
        ]


def _places(groups: Sequence[GroupStates]) -> list[_Places]:
    bodies = sum(group.prompt - 1 for group in groups)
    body, begin = 0, bodies + len(groups)
    places = []
    for number, group in enumerate(groups):
        last = bodies + number
        completions = []
        for length in group.lengths:
            completions.append((last, begin, length))
            begin += length
        prompt = (*range(body, body + group.prompt - 1), last)
        places.append(_Places(prompt, tuple(completions), group.masks))
        body += group.prompt - 1
    return places


def _in_order(parts: Sequence[tuple[Tensor, int]], axis: int) -> Tensor:
    """Tensors of groups, each with the length of its prompt, as `_Places` has them."""
    bodies = [tensor.narrow(axis, 0, prompt - 1) for tensor, prompt in parts]
    lasts = [tensor.narrow(axis, prompt - 1, 1) for tensor, prompt in parts]
    rest = [t.narrow(axis, prompt, t.shape[axis] - prompt) for t, prompt in parts]
    return torch.cat([*bodies, *lasts, *rest], axis)


def _position_ids(groups: Sequence[GroupStates], flat: bool = True) -> Any:
    """Position ids with as many axes as any group has: [1, N] or [A, 1, N] packed, else by group.

    A group of text alone may have one axis where images have three; they then agree.
    """
    axes = max(group.positions.shape[0] for group in groups)
    given = [group.positions.expand(axes, -1) for group in groups]
    if not flat:
        return given
    ids = _in_order([(p, g.prompt) for p, g in zip(given, groups, strict=True)], 1)
    return ids if axes == 1 else ids[:, None]
