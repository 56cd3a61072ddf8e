"""Numbers of a recorded evaluation: per prompt, and their means with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from latent_rl.eval.codes import CodeUsage, code_usage
from latent_rl.eval.diversity import distinct_n, distinct_responses, self_bleu
from latent_rl.eval.intervals import Interval, bootstrap_interval
from latent_rl.eval.record import Evaluation, PromptRecord, ScoredAnswer, SplitRecord
from latent_rl.eval.semantic import semantic_diversity

__all__ = [
    "GREEDY",
    "REWARD",
    "SEMANTIC_DIVERSITY",
    "SIMILARITY",
    "SplitSummary",
    "diversity_interval",
    "prompt_values",
    "summarise",
]

REWARD, GREEDY, SIMILARITY = "reward", "reward, T=0", "semantic similarity"
SEMANTIC_DIVERSITY = "semantic diversity"

PromptMetric = Callable[[PromptRecord], "float | None"]


@dataclass(frozen=True)
class SplitSummary:
    """One split of one evaluation.

    Attributes:
        metrics: by name, the mean over prompts with its interval; see ``docs/evaluation.md``.
        prompts: number of prompts.
        answers: answers scored, the greedy ones included.
        dropped: of these, answers without a reward: one failed, or none applies.
        failed: of these, answers on which a reward failed.
        usage: of the codebook by the sampled answers, or None.
        counts: occurrences per code, empty without codes.
    """

    metrics: Mapping[str, Interval]
    prompts: int
    answers: int
    dropped: int
    failed: int
    usage: CodeUsage | None


def prompt_values(evaluation: Evaluation, split: str) -> dict[str, list[float]]:
    """Every metric of every prompt of a split; NaN where a prompt has none.

    A prompt has no reward when all its samples were dropped, none of a function when it never
    applies. These values are what means, intervals and paired differences are computed from.
    """
    prompts = evaluation.splits[split].prompts
    values = {
        name: [math.nan if (v := metric(prompt)) is None else v for prompt in prompts]
        for name, metric in _metrics(evaluation).items()
    }
    return {name: column for name, column in values.items() if not all(map(math.isnan, column))}


def summarise(evaluation: Evaluation, *, resamples: int = 2000) -> dict[str, SplitSummary]:
    """Every split's numbers; intervals resample prompts."""
    return {
        name: _summary(evaluation, name, split, resamples)
        for name, split in evaluation.splits.items()
    }


def diversity_interval(similarity: Interval) -> Interval:
    """Semantic diversity from the interval of the mean similarity.

    The inverse is monotone, so the ends change places and the coverage stays.
    """
    low, high = (
        math.nan if math.isnan(end) else semantic_diversity(end)
        for end in (similarity.high, similarity.low)
    )
    return Interval(semantic_diversity(similarity.mean), low, high)


def _summary(evaluation: Evaluation, name: str, split: SplitRecord, resamples: int) -> SplitSummary:
    metrics: dict[str, Interval] = {}
    for metric, values in prompt_values(evaluation, name).items():
        known = [value for value in values if not math.isnan(value)]
        metrics[metric] = bootstrap_interval(known, resamples=resamples)
        if metric == SIMILARITY:
            metrics[SEMANTIC_DIVERSITY] = diversity_interval(metrics[metric])
    asked = [
        answer
        for prompt in split.prompts
        for answer in (*prompt.samples, *([prompt.greedy] if prompt.greedy else []))
    ]
    return SplitSummary(
        metrics=MappingProxyType(metrics),
        prompts=len(split.prompts),
        answers=len(asked),
        dropped=sum(answer.reward is None for answer in asked),
        failed=sum(answer.failed for answer in asked),
        usage=_usage(evaluation, split),
    )


def _usage(evaluation: Evaluation, split: SplitRecord) -> CodeUsage | None:
    codes = [c for prompt in split.prompts for s in prompt.samples for c in s.answer.codes]
    if evaluation.num_codes is None or not codes:
        return None
    return code_usage(torch.tensor(codes), evaluation.num_codes)


def _metrics(evaluation: Evaluation) -> dict[str, PromptMetric]:
    """Metrics by name, in the order of tables."""
    several = len(evaluation.rewards) > 1
    metrics: dict[str, PromptMetric] = {
        REWARD: lambda prompt: _mean([s.reward for s in prompt.samples]),
        GREEDY: lambda prompt: None if prompt.greedy is None else prompt.greedy.reward,
    }
    for index, reward in enumerate(evaluation.rewards if several else ()):
        metrics[f"reward {reward.name}"] = lambda prompt, index=index: _mean(  # type: ignore[misc]
            [None if s.failed else s.scores[index] for s in prompt.samples]
        )
    if evaluation.settings.samples > 1:
        size = evaluation.settings.samples
        metrics[SIMILARITY] = lambda prompt: prompt.similarity
        metrics[f"distinct@{size}"] = lambda prompt: distinct_responses([_texts(prompt.samples)])
        metrics["distinct-1"] = lambda prompt: distinct_n([_texts(prompt.samples)], 1)
        metrics["distinct-2"] = lambda prompt: distinct_n([_texts(prompt.samples)], 2)
        metrics["self-BLEU"] = lambda prompt: self_bleu(_texts(prompt.samples))
    metrics["tokens"] = lambda prompt: _mean([len(s.answer.tokens) for s in prompt.samples])
    metrics["tokens spent"] = lambda prompt: _mean([s.answer.cost for s in prompt.samples])
    metrics["finished"] = lambda prompt: _mean([s.answer.finished for s in prompt.samples])
    return metrics


def _texts(samples: Sequence[ScoredAnswer]) -> list[str]:
    return [sample.answer.text for sample in samples]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
