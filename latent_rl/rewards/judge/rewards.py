"""Judges as reward functions: pairwise against a reference, or one response at a time."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latent_rl.rewards.judge.budget import Budget
from latent_rl.rewards.judge.cache import JudgementCache
from latent_rl.rewards.judge.client import ChatClient, ChatSession
from latent_rl.rewards.judge.errors import JudgeError
from latent_rl.rewards.judge.images import ImageEncoder, images_of
from latent_rl.rewards.judge.parsing import Scores, checked_scores, read_scores
from latent_rl.rewards.judge.questions import Question, conversation_text, new_token
from latent_rl.rewards.judge.rubrics import Rubric
from latent_rl.rewards.judge.settings import JudgeSettings
from latent_rl.rewards.protocol import RewardValue
from latent_rl.rewards.text import completion_text

__all__ = ["JudgeCase", "Judgement", "PairwiseJudge", "PointwiseJudge"]


@dataclass(frozen=True)
class JudgeCase:
    """A response to judge.

    context    (heading, text) pairs the judge is shown: the conversation and what else matters
    response   the text that is judged
    reference  the text it is compared with, for a pairwise judge
    image_urls data URLs
    """

    context: tuple[tuple[str, str], ...]
    response: str
    reference: str | None = None
    image_urls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """A judge's verdict on one response.

    value         the reward
    dimensions    the same per dimension of the rubric; `value` is their mean
    position_gap  how far the two orders of a pair disagree in value; 0 for a single response
    """

    value: float
    dimensions: Mapping[str, float]
    position_gap: float = 0.0


class _Judge(ABC):
    """What both judges share: asking, caching, counting, and the reward protocol."""

    def __init__(
        self,
        settings: JudgeSettings,
        rubric: Rubric,
        *,
        reference_column: str = "reference",
        name: str = "judge",
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] | None = None,
    ) -> None:
        self.settings, self.rubric = settings, rubric
        self.reference_column = reference_column
        self.budget = Budget(settings)
        self.client = ChatClient(settings, self.budget, sleep=sleep, jitter=jitter)
        self.cache: JudgementCache | None = None
        if settings.cache_dir is not None:
            self.cache = JudgementCache(settings.cache_dir, settings.cache_max_bytes)
        self.cache_hits = 0
        self.__name__ = name

    @abstractmethod
    def questions(self, case: JudgeCase) -> tuple[Question, ...]:
        """What must be asked about a case."""

    @abstractmethod
    def verdict(self, answers: Sequence[Scores]) -> Judgement:
        """The judgement that follows from the answers to `questions`."""

    @abstractmethod
    def applies(self, reference: str | None) -> bool:
        """Whether a row with this reference can be judged."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the budget has counted; a trainer's checkpoints carry it."""
        return self.budget.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take over what `state_dict` returned."""
        self.budget.load_state_dict(state_dict)

    async def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> list[RewardValue]:
        """Score a batch: see the class; failed judgements are exception instances."""
        encoder = ImageEncoder(self.settings)
        results: list[RewardValue] = [None] * len(prompts)
        cases: dict[int, JudgeCase] = {}
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {name: column[index] for name, column in columns.items() if _per_row(column)}
            reference = self._reference(row)
            if not self.applies(reference):
                continue
            try:
                urls = encoder.urls(images_of(row, prompt))
            except (ValueError, OSError) as error:
                results[index] = error
                continue
            context = self._context(prompt, row)
            cases[index] = JudgeCase(context, completion_text(completion), reference, urls)
        before, hits, started = self.budget.state_dict(), self.cache_hits, time.perf_counter()
        judged = await self.judge(list(cases.values()))
        seconds = time.perf_counter() - started
        for index, judgement in zip(cases, judged, strict=True):
            results[index] = judgement if isinstance(judgement, Exception) else judgement.value
        log = columns.get("log_metric")
        if log is not None:
            after = self.budget.state_dict()
            used = {name: after[name] - before[name] for name in after}
            log(f"{self.__name__}/requests", float(used["requests"]))
            log(f"{self.__name__}/tokens", float(used["input_tokens"] + used["output_tokens"]))
            log(f"{self.__name__}/cache_hits", float(self.cache_hits - hits))
            log(f"{self.__name__}/seconds", seconds)
            for name, value in _means([j for j in judged if isinstance(j, Judgement)]).items():
                log(f"{self.__name__}/{name}", value)
        return results

    async def judge(self, cases: Sequence[JudgeCase]) -> list[Judgement | Exception]:
        """Judge cases: one judgement each, or the exception that prevented it.

        Equal questions, in the cache or within the batch, are asked once.

        Raises:
            RewardStop: the budget is spent and the settings say to stop.
        """
        asked = [self.questions(case) for case in cases]
        keys = [[self._key(question) for question in questions] for questions in asked]
        answers: dict[str, Scores | Exception] = {}
        missing: dict[str, Question] = {}
        for question, key in zip(
            (q for questions in asked for q in questions),
            (k for row in keys for k in row),
            strict=True,
        ):
            known = self._cached(key, question)
            if known is not None:
                answers[key] = known
            else:
                missing[key] = question
        if missing:
            answers |= await self._ask_all(missing)
        return [self._judgement([answers[key] for key in row]) for row in keys]

    def _judgement(self, answers: Sequence[Scores | Exception]) -> Judgement | Exception:
        scores: list[Scores] = []
        for answer in answers:
            if isinstance(answer, Exception):
                return answer
            scores.append(answer)
        return self.verdict(scores)

    async def _ask_all(self, questions: Mapping[str, Question]) -> dict[str, Scores | Exception]:
        """Ask at once, within the settings' concurrency and total time."""
        async with self.client.session() as session:
            tasks = {
                key: asyncio.create_task(self._ask(session, key, question))
                for key, question in questions.items()
            }
            try:
                await asyncio.wait(
                    tasks.values(),
                    timeout=self.settings.total_timeout,
                    return_when=asyncio.FIRST_EXCEPTION,
                )
            finally:
                open_tasks = [task for task in tasks.values() if not task.done()]
                for task in open_tasks:
                    task.cancel()
                await asyncio.gather(*open_tasks, return_exceptions=True)
        # A failed judgement is a value; only what must end the run is raised by a task.
        stopped = [t for t in tasks.values() if not t.cancelled() and t.exception() is not None]
        if stopped:
            stopped[0].result()
        late = f"judge: not finished within total_timeout={self.settings.total_timeout:g} s"
        return {
            key: JudgeError("timeout", late) if task.cancelled() else task.result()
            for key, task in tasks.items()
        }

    async def _ask(self, session: ChatSession, key: str, question: Question) -> Scores | Exception:
        token = new_token()
        try:
            text = await session.complete(question.messages(token, self.settings.max_chars))
            scores = read_scores(text, token, question.labels, question.rubric)
        except JudgeError as error:
            # The traceback would keep the whole request alive.
            return error.with_traceback(None)
        if self.cache is not None:
            self.cache.put(key, scores)
        return scores

    def _cached(self, key: str, question: Question) -> Scores | None:
        stored = None if self.cache is None else self.cache.get(key)
        if stored is None:
            return None
        try:
            scores = checked_scores(stored, question.labels, question.rubric)
        except JudgeError:
            return None
        self.cache_hits += 1
        return scores

    def _key(self, question: Question) -> str:
        settings = self.settings
        return question.key(
            {
                "model": settings.model,
                "base_url": settings.base_url,
                "temperature": settings.temperature,
                "max_tokens": settings.max_tokens,
                "json_mode": settings.json_mode,
                "extra_body": dict(settings.extra_body),
                "max_chars": settings.max_chars,
            }
        )

    def _reference(self, row: Mapping[str, Any]) -> str | None:
        value = row.get(self.reference_column)
        return completion_text(value) if value else None

    def _context(self, prompt: Any, row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        columns = [name for name in self.rubric.columns if row.get(name)]
        return (
            ("conversation", conversation_text(prompt)),
            *((name, _as_text(row[name])) for name in columns),
        )


class PointwiseJudge(_Judge):
    """A judge's mean score over the rubric's dimensions, as a share of its scale: in [0, 1].

    A row's `reference_column`, where it is filled, is shown as an example of a good response.

    Can be gamed by whatever sways the judge: confident tone, length, flattery, text addressed to
    it. Scores of one response drift with the judge's mood more than a comparison does; prefer
    `PairwiseJudge` where there are references.
    """

    def applies(self, reference: str | None) -> bool:
        """Always."""
        return True

    def questions(self, case: JudgeCase) -> tuple[Question, ...]:
        """One question about the response alone."""
        context = case.context
        if case.reference is not None:
            context = (*context, ("an example of a good response", case.reference))
        responses = (("response", case.response),)
        return (Question(self.rubric, context, responses, case.image_urls),)

    def verdict(self, answers: Sequence[Scores]) -> Judgement:
        """The mean share of the scale."""
        scores = answers[0]["response"]
        dimensions = {name: self.rubric.share(score) for name, score in scores.items()}
        return Judgement(sum(dimensions.values()) / len(dimensions), dimensions)


class PairwiseJudge(_Judge):
    """How far a judge puts the response above the row's reference: in [-1, 1], 0 for a tie.

        value = mean over both orders and all dimensions of (score - reference's score) / scale

    The judge sees the two responses unnamed, once in each order, and both answers count the same:
    a preference for the first place (position bias) cancels out. If one order fails, the judgement
    fails. The reward is None on rows whose `reference_column` is empty.

    Can be gamed by whatever sways the judge, above all length and text addressed to it. Combine it
    with a `LengthRange`, and read completions when it jumps.
    """

    def applies(self, reference: str | None) -> bool:
        """Where there is a reference."""
        return reference is not None

    def questions(self, case: JudgeCase) -> tuple[Question, ...]:
        """The pair in both orders.

        Raises:
            ValueError: the case has no reference.
        """
        if case.reference is None:
            raise ValueError("PairwiseJudge: the case needs a reference")
        return tuple(
            Question(
                self.rubric,
                case.context,
                (("response_1", first), ("response_2", second)),
                case.image_urls,
            )
            for first, second in (
                (case.response, case.reference),
                (case.reference, case.response),
            )
        )

    def verdict(self, answers: Sequence[Scores]) -> Judgement:
        """The mean margin of both orders."""
        first = self._margins(answers[0]["response_1"], answers[0]["response_2"])
        second = self._margins(answers[1]["response_2"], answers[1]["response_1"])
        dimensions = {name: (first[name] + second[name]) / 2 for name in first}
        gap = sum(first[name] - second[name] for name in first) / len(first)
        return Judgement(sum(dimensions.values()) / len(dimensions), dimensions, abs(gap))

    def _margins(self, ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
        share = self.rubric.share
        return {name: share(ours[name]) - share(theirs[name]) for name in ours}


def _per_row(column: Any) -> bool:
    return isinstance(column, Sequence) and not isinstance(column, (str, bytes))


def _as_text(value: Any) -> str:
    """A column as text: a mapping as lines of "name: value", without empty values."""
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {item}" for name, item in value.items() if item)
    return str(value)


def _means(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Mean of every dimension and of the position gap; nothing for no judgement."""
    if not judgements:
        return {}
    count = len(judgements)
    means = {
        name: sum(j.dimensions[name] for j in judgements) / count
        for name in judgements[0].dimensions
    }
    return {**means, "position_gap": sum(j.position_gap for j in judgements) / count}
