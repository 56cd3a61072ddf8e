"""Rewards for the form of a completion: length, pattern, JSON, tags, repetition."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from latent_rl.rewards.protocol import RewardValue
from latent_rl.rewards.text import completion_text

__all__ = [
    "IsJson",
    "LengthRange",
    "MatchesPattern",
    "OverlongPenalty",
    "RepetitionPenalty",
    "Tagged",
]

_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class LengthRange:
    """1 for a length in [minimum, maximum], falling in a line to 0 just past `margin` outside.

    tokens  count the completion's tokens instead of its words (runs without white space)

    Rewards no content at all: alone, it is gamed by any text of the right length.
    """

    def __init__(
        self,
        minimum: int,
        maximum: int,
        *,
        margin: int = 0,
        tokens: bool = False,
        name: str = "length_range",
    ) -> None:
        if not 0 <= minimum <= maximum or margin < 0:
            raise ValueError(
                "LengthRange: need 0 <= minimum <= maximum and margin >= 0, "
                f"got {minimum}, {maximum}, {margin}"
            )
        self.minimum, self.maximum, self.margin, self.tokens = minimum, maximum, margin, tokens
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
        if self.tokens:
            return [self.score(len(ids)) for ids in completion_ids]
        return [self.score(len(completion_text(said).split())) for said in completions]

    def score(self, length: int) -> float:
        """The reward of a length."""
        outside = max(self.minimum - length, length - self.maximum, 0)
        return max(0.0, 1 - outside / (self.margin + 1))


class OverlongPenalty:
    """DAPO's soft punishment of long completions (arXiv 2503.14476, equation 13), as TRL has it.

    0 up to `max_length - cache` tokens, falling in a line to -1 at `max_length`, -1 beyond. The
    trainer's own `soft_punish_cache` does the same without a reward function.
    """

    def __init__(self, max_length: int, cache: int, *, name: str = "overlong_penalty") -> None:
        if not 0 <= cache <= max_length:
            raise ValueError(
                f"OverlongPenalty: need 0 <= cache <= max_length, got {cache}, {max_length}"
            )
        self.max_length, self.cache = max_length, cache
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
        return [self.score(len(ids)) for ids in completion_ids]

    def score(self, length: int) -> float:
        """The reward of a length in tokens."""
        if length > self.max_length:
            return -1.0
        over = length - (self.max_length - self.cache)
        return -over / self.cache if over > 0 else 0.0


class RepetitionPenalty:
    """`max_penalty` times the share of token n-grams that occurred before (arXiv 2502.03373, C.2).

        (1 - different n-grams / n-grams) * max_penalty,   0 for fewer than n tokens

    As TRL's. Can be gamed by paraphrase: what is said twice in other words is no repetition.
    """

    def __init__(
        self, ngram: int = 3, max_penalty: float = -1.0, *, name: str = "repetition_penalty"
    ) -> None:
        if ngram < 1 or max_penalty > 0:
            raise ValueError(
                "RepetitionPenalty: need ngram >= 1 and max_penalty <= 0, "
                f"got {ngram}, {max_penalty}"
            )
        self.ngram, self.max_penalty = ngram, max_penalty
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
        return [self.score(ids) for ids in completion_ids]

    def score(self, ids: Sequence[int]) -> float:
        """The penalty of a completion."""
        grams = [tuple(ids[i : i + self.ngram]) for i in range(len(ids) - self.ngram + 1)]
        repeated = len(grams) - len(set(grams))
        return repeated / len(grams) * self.max_penalty if repeated else 0.0


class MatchesPattern:
    """1 where the regular expression matches the whole completion, without white space around it.

    ".", unlike elsewhere, matches line ends too. Texts above `max_chars` score 0 unread, because
    some expressions take exponential time; an expression from a stranger is not safe even so.
    Checks form alone: gamed by an empty content in the right form.

    Raises:
        ValueError: an expression that cannot be compiled.
    """

    def __init__(
        self, pattern: str, *, max_chars: int = 20_000, name: str = "matches_pattern"
    ) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"MatchesPattern: pattern cannot be compiled: {error}") from error
        self.max_chars = max_chars
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
        """The reward of a text."""
        text = text.strip()
        return float(len(text) <= self.max_chars and bool(self.pattern.fullmatch(text)))


class Tagged:
    """1 where the completion is these tags once each, in order, filled, with nothing outside them.

    `Tagged(("think", "answer"))` wants `<think>...</think><answer>...</answer>`. White space may
    stand between. Gamed by tags around nothing to the point.
    """

    def __init__(self, tags: Sequence[str] = ("think", "answer"), *, name: str = "tagged") -> None:
        if not tags or not all(re.fullmatch(r"[\w-]+", tag) for tag in tags):
            raise ValueError(f"Tagged: tags must be names, at least one, got {list(tags)}")
        self.tags = tuple(tags)
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
        """The reward of a text."""
        for tag in self.tags:
            begin, end = f"<{tag}>", f"</{tag}>"
            if text.count(begin) != 1 or text.count(end) != 1:
                return 0.0
            outside, _, rest = text.partition(begin)
            inside, _, text = rest.partition(end)
            if outside.strip() or not inside.strip():
                return 0.0
        return float(not text.strip())


class IsJson:
    """1 where the completion is one JSON object with the required keys, of the required types.

    required  key -> "string", "number", "integer", "boolean", "array", "object" or "null"
    closed    whether other keys are refused

    A code fence around it is not refused. Checks no values: gamed by empty ones.

    Raises:
        ValueError: an unknown type.
    """

    def __init__(
        self,
        required: Mapping[str, str] | None = None,
        *,
        closed: bool = False,
        name: str = "is_json",
    ) -> None:
        self.required, self.closed = dict(required or {}), closed
        for key, kind in self.required.items():
            if kind not in _JSON_TYPES:
                raise ValueError(
                    f"IsJson: {key} must be one of {', '.join(_JSON_TYPES)}, got {kind!r}"
                )
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
        """The reward of a text."""
        fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text.strip(), re.DOTALL)
        try:
            value = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            return 0.0
        if not isinstance(value, dict) or (self.closed and value.keys() - self.required.keys()):
            return 0.0
        return float(all(_has_type(value, key, kind) for key, kind in self.required.items()))


def _has_type(value: Mapping[str, Any], key: str, kind: str) -> bool:
    if key not in value or (isinstance(value[key], bool) and kind != "boolean"):
        return False
    return isinstance(value[key], _JSON_TYPES[kind])
