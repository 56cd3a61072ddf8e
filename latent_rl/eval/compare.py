"""Several evaluations side by side, with paired differences where they may be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from latent_rl.eval.intervals import Interval, paired_interval
from latent_rl.eval.record import Evaluation, RewardRecord, ScoredAnswer
from latent_rl.eval.summary import (
    GREEDY,
    REWARD,
    SEMANTIC_DIVERSITY,
    SIMILARITY,
    SplitSummary,
    prompt_values,
    summarise,
)

__all__ = ["Comparison", "MetricRow", "compare"]


@dataclass(frozen=True)
class MetricRow:
    """One metric of all runs.

    Attributes:
        metric: its name.
        values: per run, or None where the run has none.
        differences: per run, run minus first run over their common prompts; None for the first run
            and where the two are not comparable.
    """

    metric: str
    values: tuple[Interval | None, ...]
    differences: tuple[Interval | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; the first is the one others are measured against.

    Attributes:
        names: of the runs, unique.
        splits: rows by split.
        summaries: per run, its splits' numbers.
        warnings: what limits the comparison, a sentence each.
    """

    names: tuple[str, ...]
    splits: Mapping[str, tuple[MetricRow, ...]]
    summaries: tuple[Mapping[str, SplitSummary], ...]
    warnings: tuple[str, ...]


def compare(
    evaluations: Sequence[Evaluation],
    *,
    names: Sequence[str] | None = None,
    resamples: int = 2000,
) -> Comparison:
    """Compare runs with the first one.

    Differences are means over the prompts that both runs have, paired by fingerprint. They are left
    out where they would mislead: rewards with other code, settings or weights; diversity with
    another number of samples or another encoder; no common prompt. Every limit is a warning. With
    many metrics and runs some intervals exclude 0 by luck (one in twenty).

    Args:
        evaluations: at least two.
        names: of the runs; default the answerers'. Repeated ones are numbered.
        resamples: of every bootstrap.

    Raises:
        ValueError: for fewer than two evaluations, or names that do not fit.
    """
    if len(evaluations) < 2:
        raise ValueError(f"compare: needs at least two evaluations, got {len(evaluations)}")
    labels = [e.name for e in evaluations] if names is None else list(names)
    if len(labels) != len(evaluations):
        raise ValueError(
            f"compare: names must have one entry per evaluation ({len(evaluations)}), "
            f"got {len(labels)}"
        )
    labels = _unique(labels)
    summaries = tuple(summarise(e, resamples=resamples) for e in evaluations)
    warnings = [w for e, label in zip(evaluations, labels, strict=True) for w in _lost(e, label)]
    first = evaluations[0]
    pairs = [
        _Pair(first, other, labels[0], label)
        for other, label in zip(evaluations[1:], labels[1:], strict=True)
    ]
    for pair in pairs:
        warnings += pair.warnings()
    splits: dict[str, tuple[MetricRow, ...]] = {}
    for split in dict.fromkeys(name for e in evaluations for name in e.splits):
        columns = [pair.differences(split, resamples) for pair in pairs]
        metrics = dict.fromkeys(m for s in summaries if split in s for m in s[split].metrics)
        splits[split] = tuple(
            MetricRow(
                metric,
                tuple(s[split].metrics.get(metric) if split in s else None for s in summaries),
                (None, *(column.get(metric) for column in columns)),
            )
            for metric in metrics
        )
    return Comparison(tuple(labels), splits, summaries, tuple(warnings))


def _lost(evaluation: Evaluation, name: str) -> list[str]:
    lost = sum(s.reward is None for s in _answers(evaluation))
    total = len(_answers(evaluation))
    return [f"{name}: {lost} of {total} answers have no reward and were dropped"] if lost else []


def _answers(evaluation: Evaluation) -> list[ScoredAnswer]:
    prompts = [p for split in evaluation.splits.values() for p in split.prompts]
    return [a for p in prompts for a in (*p.samples, *([p.greedy] if p.greedy else []))]


@dataclass(frozen=True)
class _Pair:
    """A run and the first run."""

    first: Evaluation
    other: Evaluation
    first_name: str
    name: str

    def warnings(self) -> list[str]:
        """What limits the comparison."""
        return [f"{self.name}: {text}" for text in (*self._settings(), *self._prompts())]

    def _settings(self) -> list[str]:
        found = []
        mine, theirs = self.other.settings, self.first.settings
        for field, reason in (
            ("samples", "; diversity is not compared"),
            ("temperature", ""),
            ("max_new_tokens", ""),
            ("seed", ": part of every difference is the luck of sampling"),
        ):
            if getattr(mine, field) != getattr(theirs, field):
                here, there = getattr(mine, field), getattr(theirs, field)
                found.append(f"{field} is {here}, {self.first_name} has {there}{reason}")
        if mine.greedy != theirs.greedy:
            found.append("only one of the two was asked greedily")
        if self.other.encoder != self.first.encoder:
            found.append(
                f"sentence encoder is {self.other.encoder}, {self.first_name} has "
                f"{self.first.encoder}; semantic similarity is not compared"
            )
        return found + self._rewards()

    def _rewards(self) -> list[str]:
        mine, theirs = _by_name(self.other), _by_name(self.first)
        found = [
            f"reward {name} is not among the rewards of "
            f"{self.first_name if name in mine else self.name}"
            for name in sorted(set(mine) ^ set(theirs))
        ]
        for name in sorted(set(mine) & set(theirs)):
            if mine[name].fingerprint != theirs[name].fingerprint:
                found.append(
                    f"reward {name} has other code or settings than that of {self.first_name}"
                )
            if mine[name].weight != theirs[name].weight:
                here, there = mine[name].weight, theirs[name].weight
                found.append(f"reward {name} weighs {here:g}, in {self.first_name} {there:g}")
        if found:
            found[-1] += "; total rewards are not compared"
        return found

    def _prompts(self) -> list[str]:
        found = []
        for split in dict.fromkeys((*self.first.splits, *self.other.splits)):
            if split not in self.other.splits or split not in self.first.splits:
                lacking = self.name if split in self.first.splits else self.first_name
                found.append(f"split {split} is not in {lacking}")
                continue
            here, there = _keys(self.other, split), _keys(self.first, split)
            common = len(set(here) & set(there))
            if common < max(len(here), len(there)):
                found.append(
                    f"split {split}: {common} of {len(here)} prompts are among the {len(there)} of "
                    f"{self.first_name}; "
                    + ("differences are over these alone" if common else "no differences")
                )
        return found

    def differences(self, split: str, resamples: int) -> dict[str, Interval]:
        """Differences by metric, those that may be compared."""
        if split not in self.first.splits or split not in self.other.splits:
            return {}
        before, after = prompt_values(self.first, split), prompt_values(self.other, split)
        places = {key: place for place, key in enumerate(_keys(self.first, split))}
        common = [
            (places[key], place)
            for place, key in enumerate(_keys(self.other, split))
            if key in places
        ]
        found = {}
        for metric in before:
            if metric not in after or not self._is_comparable(metric):
                continue
            pairs = [(before[metric][i], after[metric][j]) for i, j in common]
            pairs = [(a, b) for a, b in pairs if not (math.isnan(a) or math.isnan(b))]
            if pairs:
                found[metric] = paired_interval(
                    [a for a, _ in pairs], [b for _, b in pairs], resamples=resamples
                )
        return found

    def _is_comparable(self, metric: str) -> bool:
        mine, theirs = _by_name(self.other), _by_name(self.first)
        if metric in (REWARD, GREEDY):
            return mine == theirs
        if metric.startswith("reward "):
            name = metric.removeprefix("reward ")
            return mine[name].fingerprint == theirs[name].fingerprint
        if metric in (SIMILARITY, SEMANTIC_DIVERSITY) and self.other.encoder != self.first.encoder:
            return False
        if metric == SIMILARITY or metric.startswith(("distinct", "self-BLEU")):
            return self.other.settings.samples == self.first.settings.samples
        return True


def _by_name(evaluation: Evaluation) -> dict[str, RewardRecord]:
    return {reward.name: reward for reward in evaluation.rewards}


def _keys(evaluation: Evaluation, split: str) -> list[tuple[str, int]]:
    """Prompts by fingerprint and, for repeated ones, which repetition."""
    seen: dict[str, int] = {}
    keys = []
    for prompt in evaluation.splits[split].prompts:
        seen[prompt.fingerprint] = seen.get(prompt.fingerprint, -1) + 1
        keys.append((prompt.fingerprint, seen[prompt.fingerprint]))
    return keys


def _unique(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        repeated, label = 1, name
        while label in found:
            repeated += 1
            label = f"{name} ({repeated})"
        found.append(label)
    return found
