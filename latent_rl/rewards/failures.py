"""What a failed reward is called, so that failures can be counted by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["RewardFailure", "RewardStop", "count_by_kind", "failure_kind"]

MAX_MESSAGE = 300
"""Characters of an error that a message repeats; a server's error page may be megabytes."""


class RewardStop(RuntimeError):  # noqa: N818 (not an error of the reward: it ends the run)
    """Raised by a reward function to end the run, such as when a judge's budget is spent. Every
    other exception is a failed reward."""


@dataclass(frozen=True)
class RewardFailure:
    """One reward function's failure on one completion.

    reward   the name it is logged under
    kind     see `failure_kind`
    message  what is known about it, one line
    """

    reward: str
    kind: str
    message: str


def failure_kind(error: Exception) -> str:
    """The kind under which an error is counted.

    That is the error's own `kind` where it is text (the judge's errors: "timeout", "rate_limited",
    "server_error", "malformed", ...), "timeout" for a `TimeoutError`, else the type's name.
    """
    kind = getattr(error, "kind", None)
    if isinstance(kind, str):
        return kind
    return "timeout" if isinstance(error, TimeoutError) else type(error).__name__


def one_line(error: object) -> str:
    """`error` as text on one line, cut to `MAX_MESSAGE` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def count_by_kind(failures: Iterable[RewardFailure]) -> Counter[str]:
    """How often each kind occurs."""
    return Counter(failure.kind for failure in failures)
