"""Reading completions and columns, for reward functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latent_rl.rewards.protocol import Completion

__all__ = ["column_of", "completion_text"]


def completion_text(completion: Completion) -> str:
    """The text of a completion: as it is, or joined over its messages."""
    if isinstance(completion, str):
        return completion
    return "".join(_content_text(message.get("content", "")) for message in completion)


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)


def column_of(columns: Mapping[str, Any], name: str, reward: str) -> Sequence[Any]:
    """The dataset column a reward needs.

    Raises:
        ValueError: naming the reward and the columns there are.
    """
    if name not in columns:
        raise ValueError(f"{reward}: needs the dataset column {name!r}, got {sorted(columns)}")
    found: Sequence[Any] = columns[name]
    return found
