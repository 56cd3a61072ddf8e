"""The evaluation: ask, score, record."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers

from latent_rl._version import __version__
from latent_rl.data import prompt_of
from latent_rl.eval.answering import Answer, Answerer, Row, Sampling, answer_seeds
from latent_rl.eval.code_tokens import code_uses
from latent_rl.eval.embedding import SentenceEncoder
from latent_rl.eval.record import (
    Evaluation,
    EvaluationSettings,
    PromptRecord,
    RewardRecord,
    ScoredAnswer,
    SplitRecord,
)
from latent_rl.eval.rows import prompt_text, reward_fingerprint, row_fingerprint, thumbnail
from latent_rl.eval.semantic import pairwise_similarities
from latent_rl.rewards import RewardFunction, RewardLog, RewardTable, reward_name, score_rows

__all__ = ["Scorer", "evaluate"]

_DEFAULTS = EvaluationSettings()
_MAX_ERRORS = 20


def evaluate(
    answerer: Answerer,
    splits: Mapping[str, Sequence[Row]],
    rewards: Sequence[RewardFunction],
    *,
    weights: Sequence[float] | None = None,
    settings: EvaluationSettings = _DEFAULTS,
    encoder: SentenceEncoder | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    reward_settings: Sequence[Mapping[str, Any] | None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask every prompt M times at a temperature and once greedily, and score every answer.

    Answers whose reward failed are kept in the record, marked, and enter no number.

    Args:
        answerer: who answers.
        splits: RL rows by split; "test" for in-distribution and "ood" for out-of-distribution data.
        rewards: the reward functions of training, or others.
        weights: of the rewards in the sum; default 1.
        settings: samples, temperature, length, seed.
        encoder: for semantic diversity; None leaves it out.
        decode: token ids to text, for what the codes said; None leaves that out.
        reward_settings: what each reward was made with, for its fingerprint alone.
        on_progress: called with prompts done and prompts in all.

    Raises:
        ValueError: without rewards, splits or rows; for samples < 2 with an encoder; naming a row
            that is no RL row.
    """
    started = time.perf_counter()
    scorer = Scorer(rewards, weights, reward_settings)
    _check(splits, settings, encoder)
    total, done = sum(len(rows) for rows in splits.values()), 0
    records: dict[str, SplitRecord] = {}
    for split, given in splits.items():
        rows = _with_all_columns(given)
        prompts: list[PromptRecord] = []
        for start in range(0, len(rows), settings.batch_prompts):
            indices = range(start, min(start + settings.batch_prompts, len(rows)))
            prompts += _ask(answerer, scorer, split, rows, indices, settings)
            done += len(indices)
            if on_progress is not None:
                on_progress(done, total)
        records[split] = SplitRecord(_with_similarity(prompts, encoder))
    said = [s.answer for r in records.values() for prompt in r.prompts for s in prompt.samples]
    return Evaluation(
        name=answerer.name,
        num_codes=answerer.num_codes,
        details=dict(answerer.details),
        settings=settings,
        rewards=scorer.records,
        splits=records,
        errors=tuple(scorer.errors),
        encoder=None if encoder is None else encoder.name,
        code_uses=() if decode is None else tuple(code_uses(said, decode)),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        versions={
            "latent_rl": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    )


class Scorer:
    """Reward functions with their weights, and what they reported."""

    def __init__(
        self,
        rewards: Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        settings: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> None:
        if not rewards:
            raise ValueError("evaluate: rewards must hold at least one function, got none")
        self._rewards = list(rewards)
        self._weights = [1.0] * len(rewards) if weights is None else [float(w) for w in weights]
        given = [None] * len(rewards) if settings is None else list(settings)
        for name, values in (("weights", self._weights), ("reward_settings", given)):
            if len(values) != len(rewards):
                raise ValueError(
                    f"evaluate: {name} must have one entry per reward ({len(rewards)}), "
                    f"got {len(values)}"
                )
        self._settings = given
        self._names: tuple[str, ...] = ()
        # Functions may log beside their rewards; here nobody reads it.
        self._log = RewardLog()
        self.errors: dict[str, None] = {}

    @property
    def records(self) -> tuple[RewardRecord, ...]:
        """The rewards under the names that scoring gave them (unique)."""
        names = self._names or tuple(reward_name(function) for function in self._rewards)
        return tuple(
            RewardRecord(name, weight, reward_fingerprint(function, name, settings))
            for name, weight, function, settings in zip(
                names, self._weights, self._rewards, self._settings, strict=True
            )
        )

    def score(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[ScoredAnswer]:
        """Rewards of one answer per row."""
        table = score_rows(
            self._rewards,
            rows,
            [answer.text for answer in answers],
            [answer.tokens for answer in answers],
            weights=self._weights,
            extra=self._log.arguments(),
        )
        self._names = table.names
        for error in table.errors:
            if len(self.errors) < _MAX_ERRORS:
                self.errors[error] = None
        return [_scored(answer, table, row) for row, answer in enumerate(answers)]


def _scored(answer: Answer, table: RewardTable, row: int) -> ScoredAnswer:
    scores = (values[row] for values in table.per_function)
    return ScoredAnswer(
        answer=answer,
        # NaN marks a gap in the table; JSON has no NaN.
        scores=tuple(None if score != score else float(score) for score in scores),
        reward=float(table.rewards[row]) if table.keep_mask[row] else None,
        failed=table.failed[row],
    )


def _check(
    splits: Mapping[str, Sequence[Row]],
    settings: EvaluationSettings,
    encoder: SentenceEncoder | None,
) -> None:
    if not splits:
        raise ValueError("evaluate: splits must hold at least one split, got none")
    for name, rows in splits.items():
        if not rows:
            raise ValueError(f"evaluate: split {name!r} has no rows")
        for index, row in enumerate(rows):
            prompt_of(row, f"split {name!r}, row {index}")
    if encoder is not None and settings.samples < 2:
        raise ValueError(
            "evaluate: semantic diversity needs samples >= 2 a prompt, "
            f"got {settings.samples}; give no encoder"
        )


def _with_all_columns(rows: Sequence[Row]) -> list[Row]:
    """Rows with the same columns; what one lacks is None, as data sets fill it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [row if len(row) == len(names) else {**dict.fromkeys(names), **row} for row in rows]


def _ask(
    answerer: Answerer,
    scorer: Scorer,
    split: str,
    rows: Sequence[Row],
    indices: range,
    settings: EvaluationSettings,
) -> list[PromptRecord]:
    asked = [rows[i] for i in indices]
    seeds = answer_seeds(settings.seed, split, indices, settings.samples)
    sampling = Sampling(settings.temperature, settings.max_new_tokens)
    groups = _checked(answerer, answerer.answer(asked, seeds, sampling), seeds.shape)
    repeated = [row for row in asked for _ in range(settings.samples)]
    scored = scorer.score(repeated, [answer for group in groups for answer in group])
    greedy: list[ScoredAnswer | None] = [None] * len(asked)
    if settings.greedy:
        still = dataclasses.replace(sampling, temperature=0.0)
        found = _checked(answerer, answerer.answer(asked, seeds[:, :1], still), seeds[:, :1].shape)
        greedy = list(scorer.score(asked, [group[0] for group in found]))
    size = settings.samples
    return [
        PromptRecord(
            fingerprint=row_fingerprint(row),
            prompt=prompt_text(row),
            samples=tuple(scored[place * size : (place + 1) * size]),
            greedy=greedy[place],
            thumbnails=_thumbnails(row) if index < settings.shown else (),
        )
        for place, (index, row) in enumerate(zip(indices, asked, strict=True))
    ]


def _checked(
    answerer: Answerer, groups: list[list[Answer]], shape: Sequence[int]
) -> list[list[Answer]]:
    sizes = {len(group) for group in groups}
    if len(groups) != shape[0] or sizes != {shape[1]}:
        raise ValueError(
            f"evaluate: {answerer.name} must give {shape[0]} lists of {shape[1]} answers, "
            f"got {len(groups)} of {sorted(sizes)}"
        )
    return groups


def _thumbnails(row: Row) -> tuple[str, ...]:
    return tuple(thumbnail(image) for image in prompt_of(row)[1])


def _with_similarity(
    prompts: list[PromptRecord], encoder: SentenceEncoder | None
) -> tuple[PromptRecord, ...]:
    if encoder is None:
        return tuple(prompts)
    texts = [[sample.answer.text for sample in prompt.samples] for prompt in prompts]
    return tuple(
        dataclasses.replace(prompt, similarity=similarity)
        for prompt, similarity in zip(prompts, pairwise_similarities(texts, encoder), strict=True)
    )
