"""Reading a judge's answer: exactly one set of scores, or a failure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeAlias

from latent_rl.rewards.judge.errors import JudgeError
from latent_rl.rewards.judge.rubrics import Rubric

__all__ = ["Scores", "checked_scores", "read_scores"]

Scores: TypeAlias = "dict[str, dict[str, float]]"
"""label of a response -> dimension -> score."""

_DECIMAL = re.compile(r"\d{1,6}(\.\d{1,6})?")
MAX_ANSWER_CHARS = 64 * 1024
MAX_OBJECTS = 64
"""Places where an object may begin; more is noise, and each costs a parse of the rest."""


class _DuplicateKeyError(ValueError):
    """An object that says one thing twice says nothing."""


def read_scores(text: str, token: str, labels: tuple[str, ...], rubric: Rubric) -> Scores:
    """The scores in a judge's answer.

    The answer should be one JSON object; text and code fences around it are passed over. Taken is
    the object whose "token" is that of the request. There must be one such object (the same one
    twice counts as one), with a score for each label and dimension and nothing else, each a number
    (or a decimal in quotes) within the rubric's scale.

    Raises:
        JudgeError: kind "malformed" or "out_of_range".
    """
    if len(text) > MAX_ANSWER_CHARS:
        _malformed(f"the answer has {len(text)} characters, more than {MAX_ANSWER_CHARS}")
    ours = [item for item in _objects(text) if item.get("token") == token]
    if not ours:
        _malformed(f"no JSON object with the request's token in {text!r:.200}")
    if any(item.get("scores") != ours[0].get("scores") for item in ours[1:]):
        _malformed("several JSON objects with the request's token and different scores")
    return checked_scores(ours[0].get("scores"), labels, rubric)


def checked_scores(given: Any, labels: tuple[str, ...], rubric: Rubric) -> Scores:
    """`given` as scores, if it is complete and within the scale.

    Raises:
        JudgeError: see `read_scores`.
    """
    names = tuple(dimension.name for dimension in rubric.dimensions)
    by_label = _by_name(given, labels, "scores")
    return {
        label: {
            name: _score(value, f"{label}.{name}", rubric)
            for name, value in _by_name(by_label[label], names, label).items()
        }
        for label in labels
    }


def _by_name(given: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """The values of an object whose keys, up to case and separators, are `names`."""
    if not isinstance(given, Mapping):
        _malformed(f"{where} must be an object, got {given!r:.100}")
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = re.sub(r"[\s\-]+", "_", str(key).strip().lower())
        if name not in names or name in found:
            _malformed(f"{where} has the unknown or repeated key {str(key)!r:.60}")
        found[name] = value
    missing = [name for name in names if name not in found]
    if missing:
        _malformed(f"{where} lacks {', '.join(missing)}")
    return {name: found[name] for name in names}


def _score(value: Any, where: str, rubric: Rubric) -> float:
    if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _malformed(f"{where} must be a number, got {value!r:.60}")
    if not rubric.low <= value <= rubric.high or not math.isfinite(value):
        raise JudgeError(
            "out_of_range",
            f"judge: {where} must be from {rubric.low:g} to {rubric.high:g}, got {value!r:.30}",
        )
    return float(value)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, from left to right, none inside another."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_pairs, parse_constant=_no_constant)
    position = 0
    for _ in range(MAX_OBJECTS):
        position = text.find("{", position)
        if position < 0:
            return
        try:
            item, end = decoder.raw_decode(text, position)
        except _DuplicateKeyError as error:
            _malformed(str(error))
        except (ValueError, RecursionError):
            position += 1
            continue
        position = end
        yield item
    if "{" in text[position:]:
        _malformed(f"more than {MAX_OBJECTS} places where an object may begin")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) != len(pairs):
        raise _DuplicateKeyError("an object with the same key twice")
    return item


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _malformed(reason: str) -> NoReturn:
    raise JudgeError("malformed", f"judge: {reason}")
