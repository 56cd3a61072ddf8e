"""Rollouts of numbered rows: their seeds, and groups that dynamic sampling replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from latent_rl import ops
from latent_rl.train.dynamic_sampling import Resampled, resampled_rollout
from latent_rl.train.replay import held_bytes
from latent_rl.train.rollout import Rollout, RolloutWorker
from latent_rl.train.sampling import mix_seed

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel
    from latent_rl.train.rl_config import LatentGRPOConfig

__all__ = ["RolloutSampler"]

EVAL_STREAM, RESAMPLE_STREAM = 1, 3


@dataclass(frozen=True)
class RolloutSampler:
    """Makes rollouts of a data set's rows; what comes depends on the numbers alone.

    worker    renders, completes and scores
    columns   makes what rewards are given beside the rows' columns
    autocast  context of the forward passes
    made      told of every rollout for training, also of those whose groups are replaced
    """

    args: LatentGRPOConfig
    worker: RolloutWorker
    columns: Callable[[], Mapping[str, Any]]
    autocast: Callable[[], AbstractContextManager[None]]
    made: Callable[[Rollout], None]

    def training(
        self, model: LatentActionModel, dataset: Any, numbers: Sequence[int], rollout_number: int
    ) -> Resampled:
        """Make a rollout of the given rows, or with dynamic sampling of as many."""
        args = self.args

        def roll_out(numbers: Sequence[int], attempt: int, parts: Sequence[Rollout]) -> Rollout:
            seed = mix_seed(args.seed, rollout_number, attempt, args.process_index)
            held = held_bytes([group for part in parts for group in part.groups])
            rollout = self._run(model, dataset, numbers, seed, held=held)
            self.made(rollout)
            return rollout

        def other_prompts(count: int, attempt: int) -> list[int]:
            stream = (RESAMPLE_STREAM, rollout_number, attempt, args.process_index)
            generator = torch.Generator().manual_seed(mix_seed(args.seed, *stream))
            picked = torch.randint(len(dataset), (count,), generator=generator)
            return picked.repeat_interleave(args.num_generations).tolist()

        return resampled_rollout(
            numbers,
            roll_out=roll_out,
            other_prompts=other_prompts,
            group_size=args.num_generations,
            scale=args.reward_scale(),
            rounds=args.resample_rounds(),
        )

    def evaluation(
        self, model: LatentActionModel, rows: Sequence[Any], batch_number: int, group: int
    ) -> Rollout:
        """Make `group` completions of each row, the same for the same batch number."""
        args = self.args
        seed = mix_seed(args.seed, EVAL_STREAM, batch_number, args.process_index)
        numbers = [index for index in range(len(rows)) for _ in range(group)]
        return self._run(model, rows, numbers, seed, return_hidden=False)

    def _run(
        self,
        model: LatentActionModel,
        dataset: Any,
        numbers: Sequence[int],
        seed: int,
        return_hidden: bool = True,
        held: int = 0,
    ) -> Rollout:
        unique = {number: dataset[number] for number in dict.fromkeys(numbers)}
        rows = [unique[number] for number in numbers]
        with self.autocast():
            return self.worker.run(
                model,
                rows,
                ops.row_seeds(seed, len(rows), model.device),
                columns=self.columns(),
                return_hidden=return_hidden,
                held_bytes=held,
            )
