"""Hands the micro-batches of a replay out, one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latent_rl.train.replay.rows import Replay, ReplayBatch
from latent_rl.train.replay.schedule import micro_batches
from latent_rl.train.sampling import mix_seed

if TYPE_CHECKING:
    from latent_rl.train.rl_config import LatentGRPOConfig

__all__ = ["ReplayFeed"]

SHUFFLE_STREAM = 2


class ReplayFeed:
    """Which rows a micro-step takes follows from the settings and its number alone."""

    def __init__(self, args: LatentGRPOConfig) -> None:
        self.args = args
        self._key: tuple[int, int] | None = None
        self._order: list[list[int]] = []

    def take(self, replay: Replay, micro_step: int) -> ReplayBatch:
        """Return the micro-batch of a step, and begin to bring the next one's states."""
        per_pass = self.args.steps_per_generation or 1
        number, part = divmod(micro_step, per_pass)
        if self._key != (id(replay), number):
            self._key, self._order = (id(replay), number), self._rows(replay, number)
        batch = replay.batch(self._order[part])
        if part + 1 < per_pass:
            replay.prefetch(self._order[part + 1])
        return batch

    def _rows(self, replay: Replay, number: int) -> list[list[int]]:
        """The micro-batches of one pass over a rollout."""
        args = self.args
        per_pass = args.steps_per_generation or 1
        rollout, iteration = divmod(number, args.num_iterations)
        steps = [
            (number * per_pass + part) // args.gradient_accumulation_steps
            for part in range(per_pass)
        ]
        return micro_batches(
            replay.kept_counts(),
            replay.states.group_size,
            args.per_device_train_batch_size,
            steps,
            mix_seed(args.seed, SHUFFLE_STREAM, rollout, iteration, args.process_index),
        )
