"""Rewards for naming what is true of the image: an answer, or several facts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from latent_rl.rewards.protocol import RewardValue
from latent_rl.rewards.text import column_of, completion_text

__all__ = [
    "COMPARISONS",
    "AnswerComparison",
    "ContainsAnswer",
    "ExactAnswer",
    "F1Answer",
    "GroundedFacts",
    "MatchesAnswer",
    "NumberAnswer",
    "contains_phrase",
    "words_of",
]

_ARTICLES = frozenset({"a", "an", "the"})
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*", re.UNICODE)
_NUMBER = re.compile(r"(?<![\w.])-?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|(?<![\w.])-?\d+(?:\.\d+)?")
_NUMBER_WORDS = {
    word: float(value)
    for value, word in enumerate(
        re.findall(
            r"\w+",
            """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
            fifteen sixteen seventeen eighteen nineteen twenty""",
        )
    )
}


def words_of(text: str) -> list[str]:
    """Words of a text for comparison: NFKC, lower case, without punctuation and articles, as the
    answers of SQuAD are normalised (Rajpurkar et al. 2016), for every script with spaces."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return [word for word in _WORD.findall(text) if word not in _ARTICLES]


def contains_phrase(words: Sequence[str], phrase: Sequence[str]) -> bool:
    """Whether `phrase` (not empty) occurs in `words` as consecutive whole words."""
    size = len(phrase)
    starts = range(len(words) - size + 1)
    return size > 0 and any(list(words[i : i + size]) == list(phrase) for i in starts)


def numbers_of(text: str) -> list[float]:
    """Numbers of a text in order: digits ("-3", "1,234.5") and the words zero to twenty."""
    digits = [(m.start(), float(m[0].replace(",", ""))) for m in _NUMBER.finditer(text)]
    spoken = [
        (m.start(), _NUMBER_WORDS[m[0].lower()])
        for m in re.finditer(r"[A-Za-z]+", text)
        if m[0].lower() in _NUMBER_WORDS
    ]
    return [value for _, value in sorted(digits + spoken)]


class AnswerComparison(Protocol):
    """How well a text gives one accepted answer, in [0, 1]."""

    def score(self, text: str, accepted: str) -> float:
        """Compare."""
        ...


class ExactAnswer:
    """1 where the words are the same and in the same order."""

    def score(self, text: str, accepted: str) -> float:
        """See the class."""
        return float(words_of(text) == words_of(accepted))


class ContainsAnswer:
    """1 where the answer occurs as whole words in a text of at most `max_words` words.

    Gamed by naming every candidate: keep `max_words` small, or use `NamesTheFact` where the
    candidates are known.
    """

    def __init__(self, max_words: int | None = None) -> None:
        self.max_words = max_words

    def score(self, text: str, accepted: str) -> float:
        """See the class."""
        words = words_of(text)
        if self.max_words is not None and len(words) > self.max_words:
            return 0.0
        return float(contains_phrase(words, words_of(accepted)))


class F1Answer:
    """Harmonic mean of precision and recall over words, each counted as often as it occurs.

    Gamed by neither repetition nor length, but blind to order and to "not".
    """

    def score(self, text: str, accepted: str) -> float:
        """See the class."""
        ours, theirs = Counter(words_of(text)), Counter(words_of(accepted))
        common = (ours & theirs).total()
        return 2 * common / (ours.total() + theirs.total()) if common else 0.0


class NumberAnswer:
    """1 where the text's last number equals the answer up to `tolerance` (absolute).

    Only the last one counts, so that listing candidates gives one guess, as naming one does.
    """

    def __init__(self, tolerance: float = 1e-6) -> None:
        if tolerance < 0:
            raise ValueError(f"NumberAnswer: tolerance must be >= 0, got {tolerance}")
        self.tolerance = tolerance

    def score(self, text: str, accepted: str) -> float:
        """See the class."""
        wanted, said = numbers_of(accepted), numbers_of(text)
        if len(wanted) != 1:
            raise ValueError(f"NumberAnswer: the answer must hold one number, got {accepted!r:.60}")
        return float(bool(said) and abs(said[-1] - wanted[0]) <= self.tolerance)


COMPARISONS: Mapping[str, type[ExactAnswer | ContainsAnswer | F1Answer | NumberAnswer]] = {
    "exact": ExactAnswer,
    "contains": ContainsAnswer,
    "f1": F1Answer,
    "number": NumberAnswer,
}
"""Comparisons by the name a recipe gives them."""


class MatchesAnswer:
    """How well the completion gives the row's answer: the best over the accepted ones, in [0, 1].

    column      dataset column: an answer (text or number), or a list of accepted ones (aliases);
                None: not applicable
    comparison  how a text and an answer are compared
    between     marks such as ("<answer>", "</answer>"): only what stands between the last pair is
                compared, and without one the score is 0
    name        under which the reward is logged

    Can be gamed where answers are few: the policy may learn the most frequent one without looking.
    Check it on rows whose answer depends on the image alone.

    Raises:
        ValueError: when called, for a row with an empty list of answers.
    """

    def __init__(
        self,
        column: str = "answer",
        comparison: AnswerComparison | None = None,
        *,
        between: tuple[str, str] | None = None,
        name: str = "matches_answer",
    ) -> None:
        self.column, self.between = column, between
        self.comparison: AnswerComparison = comparison or ExactAnswer()
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
        answers = column_of(columns, self.column, self.__name__)
        return [
            self._score(completion_text(completion), answer)
            for completion, answer in zip(completions, answers, strict=True)
        ]

    def _score(self, text: str, answer: Any) -> float | None:
        if answer is None:
            return None
        accepted = list(answer) if isinstance(answer, (list, tuple, set)) else [answer]
        if not accepted:
            raise ValueError(f"{self.__name__}: column {self.column!r} holds an empty list")
        if self.between is not None:
            begin, end = self.between
            _, found, tail = text.rpartition(begin)
            text, closed, _ = tail.partition(end)
            if not found or not closed:
                return 0.0
        return max(self.comparison.score(text, str(one)) for one in accepted)


class GroundedFacts:
    """F1 of the facts a completion names against those true of its image, in [0, 1].

        2 * |named and true| / (|named| + |true|),   counting facts of `facts` alone

    facts   every fact that can be named, with its aliases (the fact itself is one): naming one that
            is not true costs as much precision as naming a true one gains recall
    column  dataset column: the facts true of the row's image, one or a list; None: not applicable;
            an empty list scores 1 for naming none
    name    under which the reward is logged

    A fact within the words of another ("car" in "red car") is named by it too. Repeating a fact
    changes nothing, listing all of them scores the share of true ones. Can be
    gamed by negation ("no dog" names the dog) and by guessing facts that are nearly always true.

    Raises:
        ValueError: no facts; when called, for a fact in the column that is none of them.
    """

    def __init__(
        self,
        facts: Iterable[str] | Mapping[str, Sequence[str]],
        column: str = "facts",
        *,
        name: str = "grounded_facts",
    ) -> None:
        aliases = facts if isinstance(facts, Mapping) else dict.fromkeys(facts, ())
        if not aliases:
            raise ValueError("GroundedFacts: needs at least one fact")
        self.phrases = {
            fact: [words_of(phrase) for phrase in (fact, *others)]
            for fact, others in aliases.items()
        }
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

    def _score(self, text: str, truth: Any) -> float | None:
        if truth is None:
            return None
        true = {truth} if isinstance(truth, str) else set(truth)
        unknown = sorted(true - self.phrases.keys())
        if unknown:
            raise ValueError(
                f"{self.__name__}: column {self.column!r} holds {unknown[0]!r}, which is none of "
                "the facts"
            )
        words = words_of(text)
        named = {
            fact
            for fact, phrases in self.phrases.items()
            if any(contains_phrase(words, phrase) for phrase in phrases)
        }
        if not named and not true:
            return 1.0
        return 2 * len(named & true) / (len(named) + len(true))
