"""Samplers: repeated prompts for RL, length-grouped rows for the stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["GroupedRepeatSampler", "LengthGroupedSampler"]


class GroupedRepeatSampler(Sampler[int]):
    """Yields each prompt `group_size` times in a row, and each chunk of prompts `repeat` times.

    One chunk is the data of one rollout; it is repeated because a rollout serves `repeat`
    micro-batches (`steps_per_generation * num_iterations`) and the loader must not run ahead.
    Prompts that do not fill a last chunk are left out. The order depends on (seed, epoch) alone, so
    a resumed run sees the prompts the uninterrupted one would have seen.
    """

    def __init__(
        self,
        num_prompts: int,
        *,
        group_size: int,
        prompts_per_chunk: int,
        repeat: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        for name, value in (
            ("group_size", group_size),
            ("prompts_per_chunk", prompts_per_chunk),
            ("repeat", repeat),
        ):
            if value < 1:
                raise ValueError(f"GroupedRepeatSampler: {name} must be at least 1, got {value}")
        if num_prompts < prompts_per_chunk:
            raise ValueError(
                f"GroupedRepeatSampler: a rollout needs {prompts_per_chunk} prompts, "
                f"the dataset has {num_prompts}"
            )
        self.num_prompts = num_prompts
        self.group_size = group_size
        self.prompts_per_chunk = prompts_per_chunk
        self.repeat = repeat
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass (the Trainer calls this)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_prompts))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_prompts, generator=generator).tolist()
        last = self.num_prompts - self.prompts_per_chunk
        for start in range(0, last + 1, self.prompts_per_chunk):
            chunk = order[start : start + self.prompts_per_chunk]
            for _ in range(self.repeat):
                for prompt in chunk:
                    yield from [prompt] * self.group_size

    def __len__(self) -> int:
        chunks = self.num_prompts // self.prompts_per_chunk
        return chunks * self.prompts_per_chunk * self.group_size * self.repeat


class LengthGroupedSampler(Sampler[int]):
    """A random order whose batches hold rows of similar length, the batches themselves shuffled.

    Rows are shuffled, cut into windows of `window_batches` batches, sorted by length inside a
    window and the resulting batches shuffled. Depends on (seed, epoch) alone.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, seed: int, window_batches: int = 32
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"LengthGroupedSampler: batch_size must be >= 1, got {batch_size}")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.window = batch_size * window_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass (the Trainer calls this)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), self.window):
            window = sorted(order[start : start + self.window], key=lambda row: self.lengths[row])
            batches += [
                window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)
            ]
        # A short batch must stay last, or every batch after it would straddle two lengths.
        tail = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]
        for batch in tail:
            yield from batch

    def __len__(self) -> int:
        return len(self.lengths)
