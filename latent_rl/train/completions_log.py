"""The completions of a run, rollout by rollout: as files, in the tracker and on the console."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from latent_rl.train.checkpoint_files import write_atomically

if TYPE_CHECKING:
    from latent_rl.train.rollout_record import RolloutRecord

__all__ = ["CompletionsLog", "TableWriter", "table_writers"]

logger = logging.getLogger(__name__)

Row: TypeAlias = dict[str, Any]

MAX_ROWS = 512
"""Completions of a rollout that are kept; a table in a browser bears no more."""
MAX_CHARACTERS = 4000
"""Of a prompt or a completion."""


class TableWriter(Protocol):
    """Writes the rows of a rollout to a tracker."""

    def __call__(self, rows: Sequence[Row], step: int) -> None: ...


@dataclass(frozen=True)
class CompletionsLog:
    """Writes a table per rollout.

    directory        gets `completions_<rollout>.jsonl`, each written whole; a resumed run writes
                     the same file again
    files            how many of them are kept, the newest
    unique_prompts   show a tracker and the console one completion per prompt
    shown            completions printed per rollout; None prints all
    gather           list of rows -> rows of all processes
    main             whether this process writes
    """

    directory: Path
    files: int
    unique_prompts: bool
    shown: int | None
    gather: Callable[[list[Row]], list[Row]]
    main: bool

    def add(
        self,
        record: RolloutRecord,
        advantages: Tensor,
        *,
        rollout: int,
        step: int,
        writers: Sequence[TableWriter],
    ) -> None:
        """Log a rollout; every process calls this.

        advantages  [B], or [B, T], of which the mean is shown
        step        updates made so far
        """
        rows = self.gather(_rows(record, advantages, rollout, step))[:MAX_ROWS]
        if not self.main:
            return
        self._save(rows, rollout)
        if self.unique_prompts:
            rows = list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]
        for write in writers:
            write(rows, step)
        _print(rows[: self.shown])

    def _save(self, rows: Sequence[Row], rollout: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = self.directory / f"completions_{rollout:06d}.jsonl"
        write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
        for old in sorted(self.directory.glob("completions_*.jsonl"))[: -self.files]:
            old.unlink(missing_ok=True)


def table_writers(callbacks: Sequence[TrainerCallback]) -> list[TableWriter]:
    """Return a writer for every tracker of `report_to` that shows tables or text."""
    writers: list[TableWriter] = []
    for callback in callbacks:
        for kind, writer in _WRITERS.items():
            if isinstance(callback, kind):
                writers.append(writer(callback))
    return writers


def _tensorboard(callback: Any) -> TableWriter:
    def write(rows: Sequence[Row], step: int) -> None:
        if callback.tb_writer is not None:
            callback.tb_writer.add_text("completions", _markdown(rows), step)

    return write


def _trackio(callback: Any) -> TableWriter:
    def write(rows: Sequence[Row], step: int) -> None:
        import trackio

        columns = list(rows[0]) if rows else []
        data = [[_cell(row[name]) for name in columns] for row in rows]
        trackio.log({"completions": trackio.Table(columns=columns, data=data)}, step=step)

    return write


def _wandb(callback: Any) -> TableWriter:
    def write(rows: Sequence[Row], step: int) -> None:
        import wandb

        columns = list(rows[0]) if rows else []
        data = [[_cell(row[name]) for name in columns] for row in rows]
        wandb.log({"completions": wandb.Table(columns=columns, data=data)})

    return write


_WRITERS: Mapping[type[TrainerCallback], Callable[[Any], TableWriter]] = {
    TensorBoardCallback: _tensorboard,
    TrackioCallback: _trackio,
    WandbCallback: _wandb,
}


def _rows(record: RolloutRecord, advantages: Tensor, rollout: int, step: int) -> list[Row]:
    flat = advantages if advantages.ndim == 1 else advantages.mean(1)
    rows = []
    for index, advantage in enumerate(flat.tolist()):
        row = record.row(index)
        scores = row.pop("rewards")
        row["prompt"], row["completion"] = _cut(row["prompt"]), _cut(row["completion"])
        named = {f"rewards/{name}": value for name, value in scores.items()}
        rows.append({"rollout": rollout, "step": step, **row, **named, "advantage": advantage})
    return rows


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(_cell(value))


def _markdown(rows: Sequence[Row]) -> str:
    def cell(value: Any) -> str:
        return _short(value).replace("|", "\\|").replace("\n", "<br>")

    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in r.values()] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _print(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    names = [name for name in rows[0] if name not in ("rollout", "step")]
    table = Table(*names, title=f"rollout {rows[0]['rollout']}", show_lines=True)
    for row in rows:
        table.add_row(*(escape(_short(row[name])) for name in names))
    Console().print(table)
