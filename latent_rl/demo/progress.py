"""Progress of the demo: one bar for the whole run, one for the step, each with its time left."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["DemoProgress", "StepProgress", "TrainerProgress", "quiet_libraries"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars, prints or deprecation notes of transformers and datasets between ours."""
    import datasets
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
            yield
    finally:
        datasets.enable_progress_bars()
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


class StepProgress:
    """Moves the bar of one step, and the overall bar by the step's share."""

    def __init__(self, owner: DemoProgress, name: str, weight: float) -> None:
        self._owner, self._name, self._weight = owner, name, weight
        self._total, self._done = 1.0, 0.0
        self._bar = owner.bars.add_task(name, total=None)

    def start(self, total: float) -> None:
        """Begin a count of ``total`` units; what was done before counts no more."""
        self._total = max(total, 1.0)
        self._owner.bars.update(self._bar, total=self._total, completed=0)
        self._move(0.0)

    def advance_to(self, done: float, note: str = "") -> None:
        """``done`` units of the total are behind us."""
        label = f"{self._name} {note}".strip()
        self._owner.bars.update(self._bar, completed=min(done, self._total), description=label)
        self._move(min(done, self._total) / self._total)

    def close(self) -> None:
        """The step is over."""
        self._owner.bars.remove_task(self._bar)
        self._move(1.0)

    def _move(self, share: float) -> None:
        self._owner.advance(self._weight * (share - self._done))
        self._done = share


class DemoProgress:
    """Bars on a terminal; elsewhere one line per finished step with an estimate of what is left."""

    def __init__(self, weights: Mapping[str, float], console: Console | None = None) -> None:
        """``weights``: expected seconds of every step, in order."""
        self._weights = dict(weights)
        self._console = console or Console()
        self.bars = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._overall = self.bars.add_task("demo", total=sum(self._weights.values()))
        self._finished = self._skipped = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> DemoProgress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def advance(self, amount: float) -> None:
        """Move the overall bar."""
        self.bars.advance(self._overall, amount)

    def skip(self, name: str) -> None:
        """A step that an earlier run finished."""
        self._skipped += self._weights[name]
        self.advance(self._weights[name])
        self._say(f"{name}: done before")

    @contextmanager
    def step(self, name: str) -> Iterator[StepProgress]:
        """A bar for one step."""
        started = time.monotonic()
        step = StepProgress(self, name, self._weights[name])
        try:
            yield step
        finally:
            step.close()
        self._finished += self._weights[name]
        self._say(f"{name}: {time.monotonic() - started:.0f} s, about {self._left():.0f} s left")

    def _left(self) -> float:
        """Seconds left if the rest is as much slower than expected as what is done."""
        left = sum(self._weights.values()) - self._finished - self._skipped
        pace = (time.monotonic() - self._started) / max(self._finished, 1e-9)
        return left * pace

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False)


class TrainerProgress(TrainerCallback):
    """Drives a step's bar from a transformers Trainer, in the place of its printed logs."""

    def __init__(self, step: StepProgress) -> None:
        self._step = step
        self._note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the bar's length."""
        self._step.start(state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        self._step.advance_to(state.global_step, self._note)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the reward, or else the loss."""
        logs = kwargs.get("logs") or {}
        for name in ("reward", "loss"):
            if name in logs:
                self._note = f"{name} {float(logs[name]):.2f}"
                break
