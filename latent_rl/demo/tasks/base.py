"""What a conversation task of the demo is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from latent_rl.demo.dialogues import Quality
from latent_rl.demo.scans import Scans
from latent_rl.rewards import Gated, NamesTheFact, RewardFunction, WellFormed

__all__ = ["SPLITS", "Amounts", "Task", "TaskRewards", "task_rewards"]

Row = dict[str, Any]

SPLITS = ("rl", "test", "ood")
"""rl: prompts of training. test: the same kind on held-out scans. ood: held-out personas or role
sets, on held-out scans."""


@dataclass(frozen=True)
class Amounts:
    """How many dialogues, text-only dialogues and prompts of each split to write."""

    dialogues: int = 2000
    texts: int = 1500
    rl: int = 640
    test: int = 160


@dataclass(frozen=True)
class TaskRewards:
    """Reward functions and their weights; a perfect answer earns 1."""

    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]


class Task(Protocol):
    """A conversation task: writes its files in a benchmark's format and reads them back."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    def write(self, directory: Path, scans: Scans, amounts: Amounts, *, seed: int) -> None:
        """Write the task's files into ``directory``, which holds the scans."""
        ...

    def dialogues(self, directory: Path) -> list[Row]:
        """Conversation rows with a picture, of mixed quality."""
        ...

    def texts(self, directory: Path) -> list[Row]:
        """Conversation rows without pictures."""
        ...

    def prompts(self, directory: Path, split: str) -> list[Row]:
        """RL rows of one of ``SPLITS`` with the columns the rewards need."""
        ...

    def rewards(self) -> TaskRewards:
        """What a good answer is."""
        ...


def task_rewards(correct: NamesTheFact, fact: NamesTheFact | None, fit: Any) -> TaskRewards:
    """Correctness about the picture, fit of voice or role, and form; the latter two gated on the
    first."""
    gates = (correct,) if fact is None else (correct, fact)
    form = WellFormed(min_words=3, max_words=20, name="form")
    functions = (Gated(correct, *gates), Gated(fit, *gates), Gated(form, *gates))
    return TaskRewards(functions, (0.3, 0.5, 0.2))


DEFAULT_QUALITY = Quality()
"""Of the dialogues about pictures."""
CLEAN_QUALITY = Quality(right=1.0, slip=0.0, wrong_fact=0.0, sloppy=0.0)
"""Of the text-only dialogues: they teach to read a profile, the others how people really answer."""
