"""Evaluation of one arm on one task: rewards with intervals, diversity, use of the codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from latent_rl.demo.result import ArmResult, Sample
from latent_rl.demo.tasks import TaskRewards
from latent_rl.eval import (
    Answerer,
    Evaluation,
    EvaluationSettings,
    Interval,
    code_usage,
    evaluate,
    summarise,
    t_interval,
)
from latent_rl.eval.record import SplitRecord

__all__ = ["MAX_NEW_TOKENS", "SAMPLES", "Splits", "arm_result", "measure_arm"]

MAX_NEW_TOKENS = 28
SAMPLES = 8
_SHOWN = 4

Splits = dict[str, Sequence[Any]]
"""RL rows by split, "test" and "ood"."""


def measure_arm(
    answerer: Answerer,
    rewards: TaskRewards,
    splits: Splits,
    decode: Callable[[Sequence[int]], str],
    on_progress: Callable[[int, int], None],
) -> Evaluation:
    """Ask every prompt ``SAMPLES`` times and once greedily.

    Raises:
        RuntimeError: when a reward function failed; the table has no room to say so.
    """
    record = evaluate(
        answerer,
        splits,
        rewards.functions,
        weights=rewards.weights,
        settings=EvaluationSettings(
            samples=SAMPLES, max_new_tokens=MAX_NEW_TOKENS, batch_prompts=32, shown=_SHOWN
        ),
        decode=None if answerer.num_codes is None else decode,
        on_progress=on_progress,
    )
    if record.errors:
        raise RuntimeError(f"evaluation: rewards failed: {'; '.join(record.errors)}")
    return record


def arm_result(arm: str, task: str, record: Evaluation) -> ArmResult:
    """The row of the table: intervals over the sampling seeds, one per sample of each prompt."""
    found = summarise(record, resamples=2)
    codes = [
        code
        for split in record.splits.values()
        for prompt in split.prompts
        for sample in prompt.samples
        for code in sample.answer.codes
    ]
    usage = None
    if record.num_codes is not None:
        usage = code_usage(torch.tensor(codes), record.num_codes)
    return ArmResult(
        arm=arm,
        task=task,
        test=_over_seeds(record.splits["test"]),
        ood=_over_seeds(record.splits["ood"]),
        greedy_test=found["test"].metrics["reward, T=0"].mean,
        greedy_ood=found["ood"].metrics["reward, T=0"].mean,
        distinct_at_8=found["test"].metrics[f"distinct@{SAMPLES}"].mean,
        codes_used=usage.used if usage else None,
        code_perplexity=usage.perplexity if usage else None,
        code_counts=tuple(usage.counts.tolist()) if usage else (),
        samples=tuple(
            sample for name, split in record.splits.items() for sample in _samples(name, split)
        ),
    )


def _over_seeds(split: SplitRecord) -> Interval:
    seeds = zip(*(prompt.samples for prompt in split.prompts), strict=True)
    return t_interval([sum(s.reward or 0.0 for s in seed) / len(seed) for seed in seeds])


def _samples(name: str, split: SplitRecord) -> list[Sample]:
    return [
        Sample(
            image=prompt.thumbnails[0],
            split=name,
            prompt=prompt.prompt,
            answer=prompt.samples[0].answer.text,
            reward=prompt.samples[0].reward or 0.0,
            codes=prompt.samples[0].answer.codes,
        )
        for prompt in split.prompts[:_SHOWN]
    ]
