"""Programmatic rewards to build on: naming one fact, good form, gating one reward on another.

All follow the protocol of :mod:`latent_rl.rewards.protocol` (TRL's): called with ``prompts``,
``completions``, ``completion_ids`` and the dataset's columns, returning one number per completion.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
import re
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, cast

from latent_rl.rewards.protocol import RewardFunction, RewardOutput, RewardValue, reward_name
from latent_rl.rewards.text import column_of, completion_text

__all__ = ["Gated", "NamesTheFact", "WellFormed", "facts_named"]

_WORD = re.compile(r"[a-z0-9']+")


def facts_named(text: str, facts: Iterable[str]) -> set[str]:
    """Those of ``facts`` (single lower-case words) that occur in ``text`` as whole words."""
    return set(_WORD.findall(text.lower())) & set(facts)


class NamesTheFact:
    """1 where the answer names the right one of several facts and none of the others, else 0.

    Naming two (hedging) scores 0, so that listing every fact does not pay. Rows whose column is
    None are not applicable: the reward is None there.

    Args:
        facts: the words that exclude each other, such as the names of the ten digits.
        column: dataset column that holds the right one.
        name: under which the reward is logged.

    Raises:
        ValueError: when called, for a column whose value is none of the facts.
    """

    def __init__(self, facts: Iterable[str], column: str, name: str = "names_the_fact") -> None:
        self.facts = frozenset(fact.lower() for fact in facts)
        self.column = column
        self.__name__ = name

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> list[RewardValue]:
        """See the class."""
        truths = column_of(columns, self.column, self.__name__)
        return [
            self._score(completion_text(completion), truth)
            for completion, truth in zip(completions, truths, strict=True)
        ]

    def _score(self, text: str, truth: str | None) -> float | None:
        if truth is None:
            return None
        if truth not in self.facts:
            raise ValueError(
                f"{self.__name__}: column {self.column!r} must hold one of "
                f"{sorted(self.facts)}, got {truth!r}"
            )
        return float(facts_named(text, self.facts) == {truth})


class WellFormed:
    """Share of the marks of a well-formed answer, in {0, 1/4, ..., 1}.

    The marks: it begins with a capital letter; ends in ``.``, ``!`` or ``?``; has between
    ``min_words`` and ``max_words`` words; repeats no word at once. An empty answer scores 0.
    """

    def __init__(
        self, *, min_words: int = 1, max_words: int = 40, name: str = "well_formed"
    ) -> None:
        if not 1 <= min_words <= max_words:
            raise ValueError(
                f"WellFormed: need 1 <= min_words <= max_words, got {min_words}, {max_words}"
            )
        self.min_words, self.max_words = min_words, max_words
        self.__name__ = name

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> list[RewardValue]:
        """See the class."""
        return [self.score(completion_text(completion)) for completion in completions]

    def score(self, text: str) -> float:
        """The share of marks that ``text`` has."""
        text = text.strip()
        words = _WORD.findall(text.lower())
        if not words:
            return 0.0
        marks = (
            text[0].isupper(),
            text[-1] in ".!?",
            self.min_words <= len(words) <= self.max_words,
            all(a != b for a, b in itertools.pairwise(words)),
        )
        return sum(marks) / len(marks)


class Gated:
    """``reward`` where every gate scores 1, else 0: style earns nothing on a wrong answer.

    A gate that is not applicable (None) is open. A reward that is None stays None where the gates
    are open. Reward and gates may be asynchronous, such as a judge; a gate that failed on a row
    fails the row.
    """

    def __init__(self, reward: RewardFunction, *gates: RewardFunction) -> None:
        if not gates:
            raise ValueError("Gated: needs at least one gate")
        self.reward, self.gates = reward, gates
        self.__name__ = reward_name(reward)

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> RewardOutput | Awaitable[RewardOutput]:
        """See the class."""
        outputs = [
            function(
                prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
            )
            for function in (self.reward, *self.gates)
        ]
        if any(inspect.isawaitable(output) for output in outputs):
            return self._later(outputs)
        return _gated(cast("list[RewardOutput]", outputs))

    async def _later(
        self, outputs: list[RewardOutput | Awaitable[RewardOutput]]
    ) -> list[RewardValue]:
        return _gated(await asyncio.gather(*(_awaited(output) for output in outputs)))


async def _awaited(output: RewardOutput | Awaitable[RewardOutput]) -> RewardOutput:
    if inspect.isawaitable(output):
        return await output
    return output


def _gated(outputs: Sequence[RewardOutput]) -> list[RewardValue]:
    """The first output's values where the others are 1 or None."""
    results: list[RewardValue] = []
    for value, *gates in zip(*outputs, strict=True):
        failed = [gate for gate in gates if _has_failed(gate)]
        if failed:
            results.append(failed[0])
        else:
            results.append(value if all(gate is None or gate == 1 for gate in gates) else 0.0)
    return results


def _has_failed(value: RewardValue) -> bool:
    """Whether scoring failed, in any of the ways the protocol knows."""
    if value is None or isinstance(value, Exception):
        return value is not None
    return not math.isfinite(value)
