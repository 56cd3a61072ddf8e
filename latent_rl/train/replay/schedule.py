"""Which rows stand in which micro-batch of an update."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

__all__ = ["micro_batches"]


def micro_batches(
    lengths: Sequence[int], group_size: int, size: int, steps: Sequence[int], generator_seed: int
) -> list[list[int]]:
    """Cut the rows of a rollout into micro-batches of `size` rows.

    Rows are shuffled over the optimizer's steps. What one step sums up may come in any order, so
    within a step the rows of a group come together, which then share their prompt, and rows of
    similar length.

    Args:
        lengths: needed steps of each row, B of them.
        group_size: consecutive rows that share a prompt.
        size: rows per micro-batch.
        steps: for every micro-batch the optimizer's step it belongs to, never falling.
        generator_seed: of the shuffle.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for _, parts in groupby(steps):
        share = order[len(batches) * size :][: len(list(parts)) * size]
        # Whole groups first, longest first; Python's sort keeps the shuffle among equals.
        longest = {row // group_size: 0 for row in share}
        for row in share:
            longest[row // group_size] = max(longest[row // group_size], lengths[row])
        rank = {group: at for at, group in enumerate(longest)}
        share.sort(
            key=lambda row: (
                -longest[row // group_size],
                rank[row // group_size],
                -lengths[row],
            )
        )
        batches += [share[at : at + size] for at in range(0, len(share), size)]
    return batches
