"""Evaluation of one arm on one task: rewards with intervals, diversity, use of the codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from latent_rl.demo.result import ArmResult, Sample
from latent_rl.demo.speakers import Answers, Speaker
from latent_rl.demo.tasks import TaskRewards
from latent_rl.eval import code_usage, distinct_responses, t_interval
from latent_rl.rewards import score_rows

__all__ = ["EVALUATION_SEEDS", "Splits", "evaluate_arm", "reward_of"]

EVALUATION_SEEDS = (101, 202, 303, 404)
SAMPLES_PER_PROMPT = 8
_SHOWN = 4

Splits = dict[str, Sequence[Any]]
"""RL rows by split, "test" and "ood"."""


def reward_of(rewards: TaskRewards, rows: Sequence[Any], texts: Sequence[str]) -> list[float]:
    """Reward of one answer per row.

    Raises:
        RuntimeError: when a reward function failed; an evaluation must not lose samples quietly.
    """
    table = score_rows(rewards.functions, rows, texts, [[] for _ in texts], weights=rewards.weights)
    if not all(table.keep_mask):
        raise RuntimeError(f"evaluation: rewards failed: {'; '.join(table.errors)}")
    return list(table.rewards)


def evaluate_arm(
    arm: str,
    task: str,
    speaker: Speaker,
    rewards: TaskRewards,
    splits: Splits,
    *,
    num_codes: int,
    diversity_prompts: int,
    on_part: Callable[[], None],
) -> ArmResult:
    """Measure an arm; ``on_part`` is called after each of ``PARTS`` parts."""
    sampled: dict[str, list[float]] = {}
    greedy: dict[str, float] = {}
    codes: list[torch.Tensor] = []
    samples: list[Sample] = []
    for split, rows in splits.items():
        sampled[split] = []
        for seed in EVALUATION_SEEDS:
            answers = speaker.answer(rows, temperature=1.0, seed=seed)
            scores = reward_of(rewards, rows, answers.texts)
            sampled[split].append(sum(scores) / len(scores))
            if answers.codes is not None:
                codes.append(answers.codes.reshape(-1))
            if seed == EVALUATION_SEEDS[0]:
                samples += _samples(split, rows, answers, scores)
            on_part()
        answers = speaker.answer(rows, temperature=0.0, seed=0)
        scores = reward_of(rewards, rows, answers.texts)
        greedy[split] = sum(scores) / len(scores)
        on_part()
    repeated = [
        row for row in splits["test"][:diversity_prompts] for _ in range(SAMPLES_PER_PROMPT)
    ]
    texts = speaker.answer(repeated, temperature=1.0, seed=7).texts
    groups = [texts[i : i + SAMPLES_PER_PROMPT] for i in range(0, len(texts), SAMPLES_PER_PROMPT)]
    on_part()
    usage = code_usage(torch.cat(codes), num_codes) if codes else None
    return ArmResult(
        arm=arm,
        task=task,
        test=t_interval(sampled["test"]),
        ood=t_interval(sampled["ood"]),
        greedy_test=greedy["test"],
        greedy_ood=greedy["ood"],
        distinct_at_8=distinct_responses(groups),
        codes_used=usage.used if usage else None,
        code_perplexity=usage.perplexity if usage else None,
        code_counts=tuple(usage.counts.tolist()) if usage else (),
        samples=tuple(samples),
    )


PARTS = 2 * (len(EVALUATION_SEEDS) + 1) + 1


def _samples(
    split: str, rows: Sequence[Any], answers: Answers, scores: Sequence[float]
) -> list[Sample]:
    shown = []
    for index in range(min(_SHOWN, len(rows))):
        codes: tuple[int, ...] = ()
        if answers.codes is not None:
            codes = tuple(int(c) for c in answers.codes[index] if c >= 0)
        shown.append(
            Sample(
                image=str(rows[index]["images"][0]),
                split=split,
                prompt=_prompt_text(rows[index]["prompt"]),
                answer=answers.texts[index],
                reward=float(scores[index]),
                codes=codes,
            )
        )
    return shown


def _prompt_text(messages: Sequence[Any]) -> str:
    """The text of all turns, without image parts."""
    lines = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part.get("text") or "" for part in content)
        lines.append(f"{message['role']}: {content}")
    return "\n".join(lines)
