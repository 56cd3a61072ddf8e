"""The reward protocol: what a reward function is, and how several become one number per completion.

The protocol is TRL's, so a reward written for `trl.GRPOTrainer` works unchanged: a callable (sync
or async) called once per batch with keyword arguments, returning one value per completion.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import threading
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

from latent_rl.rewards.failures import (
    RewardFailure,
    RewardStop,
    count_by_kind,
    failure_kind,
    one_line,
)

__all__ = [
    "Completion",
    "RewardFunction",
    "RewardOutput",
    "RewardTable",
    "RewardValue",
    "reward_name",
    "score_all",
]

logger = logging.getLogger(__name__)

Completion: TypeAlias = "str | list[dict[str, Any]]"
"""A completion as text, or as a list of chat messages when the prompt is a list of messages."""

RewardValue: TypeAlias = "float | int | Exception | None"
"""A number; None where the reward does not apply to a row; NaN, infinity or an exception *instance*
where scoring that row failed."""

RewardOutput: TypeAlias = "Sequence[RewardValue]"


class RewardFunction(Protocol):
    """Scores a batch of completions.

    Called with `prompts`, `completions` and `completion_ids` (each a list with one entry per
    completion) and one list per extra dataset column. It must take `**columns` (or name every
    column) because datasets differ. It may return an awaitable.
    """

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> RewardOutput | Awaitable[RewardOutput]: ...


@dataclass(frozen=True)
class RewardTable:
    """Rewards of one batch of B completions under F functions. Nothing in it is imputed.

    rewards        [B]  weighted sum over the functions that apply; NaN where `keep_mask` is False
    per_function   F lists of [B]; NaN where a function does not apply or failed
    keep_mask      [B]  True where the row may be used: at least one function applied and none
                   failed
    failed         [B]  True where at least one function failed on the row
    failed_per_function  F tuples of [B]; True where that function failed on the row
    errors         one line per function that failed, with its first error
    failures       one entry per function and row that failed
    """

    names: tuple[str, ...]
    rewards: tuple[float, ...]
    per_function: tuple[tuple[float, ...], ...]
    keep_mask: tuple[bool, ...]
    failed: tuple[bool, ...]
    failed_per_function: tuple[tuple[bool, ...], ...]
    errors: tuple[str, ...] = ()
    failures: tuple[RewardFailure, ...] = ()

    @property
    def num_dropped(self) -> int:
        """Rows that cannot be used: failed, or no function applied."""
        return sum(not keep for keep in self.keep_mask)


def reward_name(function: RewardFunction) -> str:
    """Return the name a reward is logged under: `__name__`, of the wrapped function for a partial,
    or the class name of a callable object."""
    if isinstance(function, functools.partial):
        return reward_name(cast("RewardFunction", function.func))
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def score_all(
    functions: Sequence[RewardFunction],
    *,
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    columns: Mapping[str, list[Any]],
    weights: Sequence[float] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> RewardTable:
    """Call every reward function and combine the results into one weighted sum per completion.

    `columns` hold one entry per completion; `extra` is passed on as it is (`trainer_state`).

    Awaitables run concurrently. A function that raises loses every row of its call, a NaN, infinity
    or exception instance in its list loses that row; lost rows are reported by a warning, marked in
    `keep_mask` and never filled in. `None` leaves a function out of a row's sum.

    Raises:
        ValueError: no function; weights, column lengths or a number of returned values that do not
            match.
        RewardStop: as raised by a function.
        TypeError: a function that cannot be called with these columns, or that returned something
            that is neither a number, None nor an exception.
    """
    if not functions:
        raise ValueError("score_all: needs at least one reward function, got none")
    count = len(prompts)
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise ValueError(
            f"score_all: weights must have one entry per reward function ({len(functions)}), "
            f"got {len(weights)}"
        )
    for name, column in (
        ("completions", completions),
        ("completion_ids", completion_ids),
        *columns.items(),
    ):
        if len(column) != count:
            raise ValueError(
                f"score_all: {name} must have one entry per prompt ({count}), got {len(column)}"
            )
    arguments: dict[str, Any] = {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        **columns,
        **(extra or {}),
    }
    names = _unique([reward_name(function) for function in functions])
    for name, function in zip(names, functions, strict=True):
        _check_signature(name, function, arguments)
    outputs = _run(_call_all(functions, arguments))
    columns_of_values, lost_rows, errors = [], [], []
    failures: list[RewardFailure] = []
    for name, output in zip(names, outputs, strict=True):
        values, found = _read(name, output, count)
        columns_of_values.append(values)
        lost_rows.append(tuple(item is not None for item in found))
        lost = [item for item in found if item is not None]
        if lost:
            failures += lost
            errors.append(lost[0].message)
            kinds = ", ".join(f"{kind} {n}" for kind, n in count_by_kind(lost).most_common())
            logger.warning("%s; %d of %d samples dropped (%s)", errors[-1], len(lost), count, kinds)
    failed = [any(rows) for rows in zip(*lost_rows, strict=True)]
    rewards, keep_mask = _combine(columns_of_values, weights, failed)
    return RewardTable(
        names=tuple(names),
        rewards=tuple(rewards),
        per_function=tuple(tuple(values) for values in columns_of_values),
        keep_mask=tuple(keep_mask),
        failed=tuple(failed),
        failed_per_function=tuple(lost_rows),
        errors=tuple(errors),
        failures=tuple(failures),
    )


def _check_signature(name: str, function: RewardFunction, arguments: Mapping[str, Any]) -> None:
    """Refuse a function whose call would fail before its first line: that is no failed reward."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without one; calling it will tell
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise TypeError(
            f"reward {name} cannot be called: {error}; it is given {', '.join(sorted(arguments))}, "
            "each of which it must name or take by **columns"
        ) from None


def _combine(
    columns: list[list[float]], weights: Sequence[float], failed: list[bool]
) -> tuple[list[float], list[bool]]:
    rewards, keep_mask = [], []
    for row, lost in enumerate(failed):
        applied = [
            weight * values[row]
            for weight, values in zip(weights, columns, strict=True)
            if not math.isnan(values[row])
        ]
        keep = bool(applied) and not lost
        rewards.append(sum(applied) if keep else math.nan)
        keep_mask.append(keep)
    return rewards, keep_mask


def _read(
    name: str, output: RewardOutput | Exception, count: int
) -> tuple[list[float], list[RewardFailure | None]]:
    """Return (values [B] with NaN gaps, the failure of each row or None [B]) of one function."""
    if isinstance(output, Exception):
        message = f"reward {name} raised {type(output).__name__}: {one_line(output)}"
        return [math.nan] * count, [RewardFailure(name, failure_kind(output), message)] * count
    values = list(output)
    if len(values) != count:
        raise ValueError(
            f"reward {name} must return one value per completion ({count}), got {len(values)}"
        )
    numbers: list[float] = []
    failures: list[RewardFailure | None] = []
    for value in values:
        number, failure = math.nan, None
        if isinstance(value, Exception):
            message = f"reward {name} failed: {type(value).__name__}: {one_line(value)}"
            failure = RewardFailure(name, failure_kind(value), message)
        elif value is not None:
            number = _number(name, value)
            if not math.isfinite(number):
                failure = RewardFailure(name, "not_finite", f"reward {name} failed: {number}")
                number = math.nan
        numbers.append(number)
        failures.append(failure)
    return numbers, failures


def _number(name: str, value: Any) -> float:
    """`value` as a float; a text that looks like a number is none."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("text")
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"reward {name} must return numbers, None or exceptions, got {value!r:.100}"
        ) from error


async def _call_all(
    functions: Sequence[RewardFunction], arguments: dict[str, Any]
) -> list[RewardOutput | Exception]:
    """Call all functions in order, then await what is awaitable concurrently. Exceptions are values
    here because one broken reward must not hide the scores of the others."""
    started: list[RewardOutput | Awaitable[RewardOutput] | Exception] = []
    for function in functions:
        try:
            started.append(function(**arguments))
        except RewardStop:
            for item in started:
                if inspect.iscoroutine(item):
                    item.close()
            raise
        except Exception as error:  # a user's callable may raise anything; it is reported by _read
            logger.debug("reward %s raised", reward_name(function), exc_info=True)
            started.append(error)
    pending = [_wait(item) for item in started if inspect.isawaitable(item)]
    finished = iter(await asyncio.gather(*pending))
    return [next(finished) if inspect.isawaitable(item) else item for item in started]


async def _wait(item: Awaitable[RewardOutput]) -> RewardOutput | Exception:
    try:
        return await item
    except RewardStop:
        raise
    except Exception as error:  # as in _call_all
        logger.debug("async reward raised", exc_info=True)
        return error


def _run(
    work: Any,
) -> list[RewardOutput | Exception]:
    """Run a coroutine to its end, in a thread of its own when a loop already runs here
    (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return cast("list[RewardOutput | Exception]", asyncio.run(work))
    box: list[Any] = []

    def target() -> None:
        try:
            box.append(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            box.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if isinstance(box[0], BaseException):
        raise box[0]
    return cast("list[RewardOutput | Exception]", box[0])


def _unique(names: list[str]) -> list[str]:
    """Number repeated names (`f`, `f_2`) so that no metric overwrites another."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique
