"""Who sees whom in a packed row, in the forms that attention kernels take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["FULL", "SLIDING", "Block", "Packing", "Piece", "Ragged"]

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Piece:
    """Consecutive positions of one sequence asking the sequence up to themselves.

    queries  their packed positions
    keys     packed positions of the sequence, from its beginning
    place    of the first query in the sequence
    masks    by kind of layer, bool [queries, keys] in the place of order and window
    """

    queries: Sequence[int]
    keys: Sequence[int]
    place: int
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Queries and keys."""
        return len(self.queries), len(self.keys)


@dataclass(frozen=True)
class Block:
    """b pieces attended to in one call, padded to Q queries and S keys.

    pieces   b of them
    shape    b, Q, S
    queries  int64 [b * Q], packed positions of the queries; padding repeats a real one
    keys     int64 [b * S], the same of the keys
    places   int64 [b, Q, 1], a query's place in its own sequence
    real     int64 [n], which of the b * Q are real
    """

    pieces: tuple[Piece, ...]
    shape: tuple[int, int, int]
    queries: Tensor
    keys: Tensor
    places: Tensor
    real: Tensor
    _cache: dict[int | None, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, pieces: Sequence[Piece], device: torch.device) -> Block:
        """Pad pieces to the largest."""
        q, s = (max(piece.size[axis] for piece in pieces) for axis in (0, 1))
        queries: list[int] = []
        keys: list[int] = []
        real: list[int] = []
        for number, piece in enumerate(pieces):
            queries += [*piece.queries, *[piece.queries[0]] * (q - len(piece.queries))]
            keys += [*piece.keys, *[piece.keys[0]] * (s - len(piece.keys))]
            real += range(number * q, number * q + len(piece.queries))
        begins = torch.tensor([piece.place for piece in pieces], device=device)[:, None]
        return cls(
            pieces=tuple(pieces),
            shape=(len(pieces), q, s),
            queries=torch.tensor(queries, device=device),
            keys=torch.tensor(keys, device=device),
            places=(begins + torch.arange(q, device=device))[:, :, None],
            real=torch.tensor(real, device=device),
        )

    def mask(self, window: int | None) -> Tensor | None:
        """bool [b, 1, Q, S]; None when plain causal attention says it all."""
        if window not in self._cache:
            self._cache[window] = self._mask(window)
        return self._cache[window]

    def _mask(self, window: int | None) -> Tensor | None:
        kind = FULL if window is None else SLIDING
        given = [(row, p.masks[kind]) for row, p in enumerate(self.pieces) if kind in p.masks]
        wide = window is None or window >= self.shape[2]
        square = all(p.place == 0 and p.size[0] == p.size[1] for p in self.pieces)
        if square and wide and not given:
            return None
        # What pads a sequence stands behind it: no real query sees it, and it sees something.
        at = torch.arange(self.shape[2], device=self.queries.device)
        seen = at <= self.places
        if window is not None:
            seen = seen & (at > self.places - window)
        for row, mask in given:
            seen[row, : mask.shape[0], : mask.shape[1]] = mask
        return seen[:, None]


@dataclass(frozen=True)
class Ragged:
    """Pieces end to end, without padding.

    queries, keys          int64, packed positions
    query_ends, key_ends   int32 [n + 1], where each piece's end, from 0
    most_queries, most_keys  of a piece
    restore                int64, where each packed position's output is among the queries
    """

    queries: Tensor
    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int
    restore: Tensor

    @classmethod
    def of(cls, pieces: Sequence[Piece], begin: int, device: torch.device) -> Ragged:
        """Pieces that ask for the packed positions from `begin` on."""
        sizes = [piece.size for piece in pieces]
        queries = torch.tensor([q for piece in pieces for q in piece.queries], device=device)
        keys = torch.tensor([k for piece in pieces for k in piece.keys], device=device)
        restore = torch.empty_like(queries)
        restore[queries - begin] = torch.arange(len(queries), device=device)

        def ends(axis: int) -> Tensor:
            counts = accumulate((size[axis] for size in sizes), initial=0)
            return torch.tensor(list(counts), dtype=torch.int32, device=device)

        most = [max(size[axis] for size in sizes) for axis in (0, 1)]
        return cls(queries, keys, ends(0), ends(1), most[0], most[1], restore)


@dataclass(frozen=True)
class Packing:
    """How the N positions of a packed row belong together.

    blocks   whose real queries are the positions from `begin` on
    restore  int64 [N - begin], where their outputs are among the blocks' queries end to end
    begin    positions before it are not asked for
    final    of the last layer, whose output is needed from `final.begin` on alone; None: of all
    """

    blocks: tuple[Block, ...]
    restore: Tensor
    begin: int = 0
    final: Packing | None = None

    @cached_property
    def ragged(self) -> Ragged:
        """The same pieces end to end, for kernels that take sequences of any length."""
        pieces = [piece for block in self.blocks for piece in block.pieces]
        return Ragged.of(pieces, self.begin, self.restore.device)

    @property
    def is_causal(self) -> bool:
        """Whether order and window say who sees whom."""
        return not any(piece.masks for block in self.blocks for piece in block.pieces)

    @classmethod
    def of(cls, blocks: Sequence[Block], begin: int = 0, final: Packing | None = None) -> Packing:
        """Blocks that ask for the positions from `begin` on."""
        queries = [block.queries[block.real] - begin for block in blocks]
        restore = torch.empty_like(torch.cat(queries))
        done = 0
        for asked, block in zip(queries, blocks, strict=True):
            restore[asked] = block.real + done
            done += len(block.queries)
        return cls(tuple(blocks), restore, begin, final)
