"""Rollouts: render prompts, act with the latent policy, score the completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from latent_rl.decode import Decoder
from latent_rl.models import LatentGeneration, Trace
from latent_rl.rewards import RewardFailure, RewardFunction, RewardTable, score_rows
from latent_rl.train.advantages import RewardScale, group_advantages
from latent_rl.train.replay import join_traces

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel
    from latent_rl.train.rl_config import LatentGRPOConfig

__all__ = ["PromptRenderer", "Rollout", "RolloutWorker", "join_rollouts"]

Row: TypeAlias = "Mapping[str, Any]"

PromptRenderer: TypeAlias = Callable[[Any, list[dict[str, Any]]], Mapping[str, Tensor]]
"""(processing_class, rows with `prompt` and `images`) -> left-padded model inputs."""


@dataclass(frozen=True)
class Rollout:
    """B scored completions, consecutive `group_size` rows per prompt.

    rows        the dataset rows, one per completion
    texts       decoded completions
    codes, logprobs, completion_mask [B, T]; terminated [B] bool (an end-of-sequence token was
    emitted); seeds [B]; rewards [B] float32 with NaN where keep_mask [B] is False
    per_function [B, F] with NaN gaps; names of the F functions; failed [B, F] bool
    failures     one entry per function and completion that failed
    """

    rows: list[Row]
    texts: list[str]
    trace: Trace | None
    prompt_length: int
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

    def select(self, rows: Tensor) -> Rollout:
        """Return the given completions (int64 [R])."""
        picked = rows.tolist()
        return Rollout(
            rows=[self.rows[i] for i in picked],
            texts=[self.texts[i] for i in picked],
            trace=None if self.trace is None else self.trace.select(rows),
            prompt_length=self.prompt_length,
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

    lengths = [part.prompt_length for part in parts]
    traces = [part.trace for part in parts if part.trace is not None]
    return Rollout(
        rows=[row for part in parts for row in part.rows],
        texts=[text for part in parts for text in part.texts],
        trace=join_traces(traces, lengths, steps) if traces else None,
        prompt_length=max(lengths),
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
        self.renderer = renderer
        self._decoder: Decoder | None = None

    @torch.no_grad()
    def run(
        self,
        model: LatentActionModel,
        rows: list[Row],
        seeds: Tensor,
        *,
        columns: Mapping[str, Any],
        return_hidden: bool = True,
    ) -> Rollout:
        """Generate one completion per row from its own seed and score them all.

        columns: extra keyword arguments for the reward functions, the same for every row
        (`trainer_state`). `seconds` is the time of generation alone.
        """
        generate = self._decode if self.args.use_decoder else self._generate
        generation, seconds = generate(model, rows, seeds, return_hidden)
        mask = generation.completion_mask
        ids = [
            row[keep].tolist() for row, keep in zip(generation.completion_ids, mask, strict=True)
        ]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        table = self._score(rows, texts, ids, columns)
        device = mask.device
        # Every completion that stopped before the batch's last step ended by a token; one as long
        # as the batch did only if its last token is an end.
        ends = torch.tensor(_end_ids(model), device=device)
        last = (mask.sum(1) - 1).clamp(min=0)[:, None]
        terminated = torch.isin(generation.completion_ids.gather(1, last)[:, 0], ends)
        return Rollout(
            rows=rows,
            texts=texts,
            trace=generation.trace,
            prompt_length=generation.prompt_length,
            codes=generation.codes,
            logprobs=generation.logprobs,
            completion_mask=mask,
            terminated=terminated,
            seeds=seeds,
            rewards=torch.tensor(table.rewards, device=device),
            keep_mask=torch.tensor(table.keep_mask, device=device),
            per_function=torch.tensor(table.per_function, device=device).T.contiguous(),
            failed=torch.tensor(table.failed_per_function, device=device).T.contiguous(),
            names=table.names,
            failures=table.failures,
            seconds=seconds,
        )

    def _decode(
        self, model: LatentActionModel, rows: list[Row], seeds: Tensor, return_hidden: bool
    ) -> tuple[LatentGeneration, float]:
        """Completions by the decoding engine, which reads a group's prompt once; and seconds."""
        args = self.args
        if self._decoder is None or self._decoder.model is not model:
            self._decoder = Decoder(model, tokenizer=self.processing_class)
        self._decoder.slots = args.decoder_slots or len(rows)
        group = _group_size(rows)
        inputs = self._render(rows[::group], model.device)
        started = time.perf_counter()
        out = self._decoder.generate(
            inputs,
            max_new_tokens=args.max_completion_length,
            num_generations=group,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p or 0.0,
            seed=seeds,
            do_sample_tokens=args.do_sample_tokens,
            return_hidden=return_hidden,
            **(args.generation_kwargs or {}),
        )
        return out.generation, time.perf_counter() - started

    def _generate(
        self, model: LatentActionModel, rows: list[Row], seeds: Tensor, return_hidden: bool
    ) -> tuple[LatentGeneration, float]:
        """Completions by the model's own generate; and seconds."""
        args = self.args
        inputs = self._render(rows, model.device)
        started = time.perf_counter()
        out = model.generate(
            inputs,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p or 0.0,
            seed=seeds,
            do_sample_tokens=args.do_sample_tokens,
            return_hidden=return_hidden,
            generation_kwargs=args.generation_kwargs,
        )
        return out, time.perf_counter() - started

    def _render(self, rows: list[Row], device: torch.device) -> dict[str, Tensor]:
        prepared = []
        for row in rows:
            prompt, images = row["prompt"], row.get("images")
            if images is None and row.get("image") is not None:
                images = [row["image"]]
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            prepared.append({**row, "prompt": prompt, "images": list(images or [])})
        inputs = self.renderer(self.processing_class, prepared)
        return {
            name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)
        }

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


def _group_size(rows: list[Row]) -> int:
    """How many times each prompt is repeated, when all are equally often and in a row; else 1."""
    starts = [i for i in range(len(rows)) if i == 0 or rows[i] is not rows[i - 1]]
    group = len(rows) // len(starts)
    return group if starts == list(range(0, len(rows), group)) else 1


def _end_ids(model: LatentActionModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return [int(end) for end in ends] if isinstance(ends, (list, tuple)) else [int(ends)]
