"""Rollouts: render prompts, act with the latent policy, score the completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latent_rl.ops.ranges import phase
from latent_rl.rewards import RewardFailure, RewardFunction, RewardTable, score_rows
from latent_rl.train.advantages import RewardScale, group_advantages
from latent_rl.train.completions import CompletionMaker, PromptRenderer, Row
from latent_rl.train.replay.archive import KeptGroup

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel
    from latent_rl.train.rl_config import LatentGRPOConfig

__all__ = ["PromptRenderer", "Rollout", "RolloutWorker", "join_rollouts"]


@dataclass(frozen=True)
class Rollout:
    """B scored completions, consecutive `group_size` rows per prompt.

    rows        the dataset rows, one per completion
    texts       decoded completions
    groups      what was kept of each group's states, in the order of the rows; empty if nothing
    forecast_bytes  what the states take at most, said before the rollout
    codes, logprobs, completion_mask [B, T]; terminated [B] bool (an end-of-sequence token was
    emitted); seeds [B]; rewards [B] float32 with NaN where keep_mask [B] is False
    per_function [B, F] with NaN gaps; names of the F functions; failed [B, F] bool
    failures     one entry per function and completion that failed
    """

    rows: list[Row]
    texts: list[str]
    groups: tuple[KeptGroup, ...]
    forecast_bytes: int
    codes: Tensor
    logprobs: Tensor
    completion_mask: Tensor
    terminated: Tensor
    seeds: Tensor
    rewards: Tensor
    keep_mask: Tensor
    per_function: Tensor
    failed: Tensor
    names: tuple[str, ...]
    failures: tuple[RewardFailure, ...]
    seconds: float

    def __len__(self) -> int:
        return len(self.rows)

    def informative_groups(self, group_size: int, scale: RewardScale) -> Tensor:
        """Return bool [P], True for groups whose kept rewards differ."""
        return group_advantages(self.rewards, group_size, scale, self.keep_mask).group_std > 1e-8

    def select_groups(self, groups: Tensor, group_size: int) -> Rollout:
        """Return the completions of the given groups (int64 [P])."""
        offsets = torch.arange(group_size, device=groups.device)
        rows = (groups[:, None] * group_size + offsets).flatten()
        picked = rows.tolist()
        return Rollout(
            rows=[self.rows[i] for i in picked],
            texts=[self.texts[i] for i in picked],
            groups=tuple(self.groups[i] for i in groups.tolist()),
            forecast_bytes=self.forecast_bytes * len(picked) // max(1, len(self)),
            codes=self.codes[rows],
            logprobs=self.logprobs[rows],
            completion_mask=self.completion_mask[rows],
            terminated=self.terminated[rows],
            seeds=self.seeds[rows],
            rewards=self.rewards[rows],
            keep_mask=self.keep_mask[rows],
            per_function=self.per_function[rows],
            failed=self.failed[rows],
            names=self.names,
            failures=self.failures,
            seconds=self.seconds,
        )


def join_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Join rollouts into one batch, shorter ones padded (codes with -1, masks with False)."""
    if len(parts) == 1:
        return parts[0]
    steps = [part.codes.shape[1] for part in parts]
    longest = max(steps)

    def joined(name: str, value: float) -> Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(getattr(p, name), (0, longest - s), value=value)
                for p, s in zip(parts, steps, strict=True)
            ]
        )

    def stacked(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Rollout(
        rows=[row for part in parts for row in part.rows],
        texts=[text for part in parts for text in part.texts],
        groups=tuple(group for part in parts for group in part.groups),
        forecast_bytes=sum(part.forecast_bytes for part in parts),
        codes=joined("codes", -1),
        logprobs=joined("logprobs", 0.0),
        completion_mask=joined("completion_mask", False),
        terminated=stacked("terminated"),
        seeds=stacked("seeds"),
        rewards=stacked("rewards"),
        keep_mask=stacked("keep_mask"),
        per_function=stacked("per_function"),
        failed=stacked("failed"),
        names=parts[0].names,
        failures=tuple(failure for part in parts for failure in part.failures),
        seconds=sum(part.seconds for part in parts),
    )


class RolloutWorker:
    """Makes rollouts of a model under the settings of a run."""

    def __init__(
        self,
        args: LatentGRPOConfig,
        reward_funcs: Sequence[RewardFunction],
        processing_class: Any,
        renderer: PromptRenderer,
    ) -> None:
        self.args = args
        self.reward_funcs = list(reward_funcs)
        self.processing_class = processing_class
        self.maker = CompletionMaker(args, processing_class, renderer)

    @torch.no_grad()
    def run(
        self,
        model: LatentActionModel,
        rows: list[Row],
        seeds: Tensor,
        *,
        columns: Mapping[str, Any],
        return_hidden: bool = True,
        held_bytes: int = 0,
    ) -> Rollout:
        """Generate one completion per row from its own seed and score them all.

        columns: extra keyword arguments for the reward functions, the same for every row
        (`trainer_state`). return_hidden: keep states for the updates, beside `held_bytes` of
        earlier rollouts. `seconds` is the time of generation alone.
        """
        made = self.maker.make(model, rows, seeds, keep=return_hidden, held=held_bytes)
        mask = made.mask
        ids = [row[keep].tolist() for row, keep in zip(made.ids, mask, strict=True)]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        with phase("reward"):
            table = self._score(rows, texts, ids, columns)
        device = mask.device
        # Every completion that stopped before the batch's last step ended by a token; one as long
        # as the batch did only if its last token is an end.
        ends = torch.tensor(_end_ids(model), device=device)
        last = (mask.sum(1) - 1).clamp(min=0)[:, None]
        terminated = torch.isin(made.ids.gather(1, last)[:, 0], ends)
        return Rollout(
            rows=rows,
            texts=texts,
            groups=made.groups,
            forecast_bytes=made.forecast_bytes,
            codes=made.codes,
            logprobs=made.logprobs,
            completion_mask=mask,
            terminated=terminated,
            seeds=seeds,
            rewards=torch.tensor(table.rewards, device=device),
            keep_mask=torch.tensor(table.keep_mask, device=device),
            per_function=torch.tensor(table.per_function, device=device).T.contiguous(),
            failed=torch.tensor(table.failed_per_function, device=device).T.contiguous(),
            names=table.names,
            failures=table.failures,
            seconds=made.seconds,
        )

    def _score(
        self,
        rows: list[Row],
        texts: list[str],
        ids: list[list[int]],
        extra: Mapping[str, Any],
    ) -> RewardTable:
        return score_rows(
            self.reward_funcs, rows, texts, ids, weights=self.args.reward_weights, extra=extra
        )


def _end_ids(model: LatentActionModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return [int(end) for end in ends] if isinstance(ends, (list, tuple)) else [int(ends)]
