"""A reward for speaking as the character or role of a row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from latent_rl.rewards.matching import contains_phrase, words_of
from latent_rl.rewards.protocol import RewardValue
from latent_rl.rewards.text import completion_text

__all__ = ["PersonaMarkers", "profile_markers", "role_markers"]

_SEPARATORS = re.compile(r"[\n;/|\"“”«»]+|(?<=[.!?])\s+")
_NAME = re.compile(r"\b[A-Z][\w'’-]+(?: [A-Z][\w'’-]+)*")
# Words that begin sentences or name no role, in the profiles and role sets of the two benchmarks.
_COMMON = frozenset(
    re.findall(
        r"\w+",
        """he she it they his her their its him them i you we my your our this that these those
        in on at by for from of to with as is was are were be been has had have and or but when
        while after before during despite although because also who whose which where there here
        not no one dr mr mrs ms miss sir lady""",
    )
)


def profile_markers(profile: Mapping[str, Any], character: str = "") -> list[list[str]]:
    """Phrases that a character of MMRole would use, as lists of words.

    Its catchphrases (each sentence or quoted phrase of the field), and the names in `relationship`.
    The character's own name is none: speaking of oneself by name is not speaking as oneself.
    """
    phrases = [words_of(part) for part in _SEPARATORS.split(str(profile.get("catchphrase") or ""))]
    own = set(words_of(character))
    names = [words_of(name) for name in _NAME.findall(str(profile.get("relationship") or ""))]
    phrases += [name for name in names if not set(name) <= own | _COMMON]
    return _distinct(phrases)


def role_markers(role_set: Mapping[str, Any], location: str | None = None) -> list[list[str]]:
    """Words of the role a PCogAlign row is about, that of its location where it has one."""
    here = None if location is None else role_set.get(location)
    roles = list(role_set.values()) if here is None else [here]
    return _distinct(
        [word] for role in roles for word in words_of(str(role)) if word not in _COMMON
    )


def _distinct(phrases: Iterable[list[str]]) -> list[list[str]]:
    return [list(words) for words in dict.fromkeys(tuple(p) for p in phrases if p)]


class PersonaMarkers:
    """How many different markers of its character or role a completion has, in [0, 1].

        min(1, different markers / enough) * thinning

    Markers come from the row: `profile` (and `character`) of an MMRole row through
    `profile_markers`, `role_set` (and `location`) of a PCogAlign row through `role_markers`, and
    `style_words`, a column or the setting. A row without any marker is not applicable.

    enough       different markers for the full score
    max_share    share of the words that may be markers; above it the score falls in proportion, to
                 0 for an answer of markers alone
    style_words  words that count in every row
    name         under which the reward is logged

    A marker counts once, however often it is repeated, and a list of markers earns nothing. Can
    still be gamed by dropping two catchphrases into any answer: it rewards the surface of a
    character. Weigh it low, behind a reward for the answer (`Gated`).
    """

    def __init__(
        self,
        *,
        enough: int = 2,
        max_share: float = 0.5,
        style_words: Sequence[str] = (),
        name: str = "persona_markers",
    ) -> None:
        if enough < 1:
            raise ValueError(f"PersonaMarkers: enough must be >= 1, got {enough}")
        if not 0 < max_share < 1:
            raise ValueError(f"PersonaMarkers: max_share must be in (0, 1), got {max_share}")
        self.enough, self.max_share = enough, max_share
        self.style = [words_of(word) for word in style_words]
        self.__name__ = name

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> list[RewardValue]:
        """See the class.

        Raises:
            ValueError: rows with none of the columns, and no `style_words` set.
        """
        known = {"profile", "role_set", "style_words"} & columns.keys()
        if not known and not self.style:
            raise ValueError(
                f"{self.__name__}: needs a column profile, role_set or style_words, "
                f"got {sorted(columns)}"
            )
        results: list[RewardValue] = []
        for index, completion in enumerate(completions):
            row = {name: columns[name][index] for name in (*known, *_BESIDE) if name in columns}
            results.append(self._score(completion_text(completion), self._markers(row)))
        return results

    def _markers(self, row: Mapping[str, Any]) -> list[list[str]]:
        markers = list(self.style)
        if row.get("profile"):
            markers += profile_markers(row["profile"], str(row.get("character") or ""))
        if row.get("role_set"):
            markers += role_markers(row["role_set"], row.get("location"))
        markers += [words_of(word) for word in row.get("style_words") or ()]
        return _distinct(markers)

    def _score(self, text: str, markers: list[list[str]]) -> float | None:
        if not markers:
            return None
        words = words_of(text)
        found = [marker for marker in markers if contains_phrase(words, marker)]
        if not found:
            return 0.0
        share = _covered(words, found) / len(words)
        thinning = 1.0 if share <= self.max_share else (1 - share) / (1 - self.max_share)
        return min(1.0, len(found) / self.enough) * thinning


_BESIDE = ("character", "location")


def _covered(words: Sequence[str], phrases: Sequence[Sequence[str]]) -> int:
    """Number of words that belong to an occurrence of a phrase."""
    covered = [False] * len(words)
    for phrase in phrases:
        size = len(phrase)
        for start in range(len(words) - size + 1):
            if list(words[start : start + size]) == list(phrase):
                covered[start : start + size] = [True] * size
    return sum(covered)
