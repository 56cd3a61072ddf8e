"""What a record says: a table on the terminal, a plot beside the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.train.scale import decode, iteration, stages
from benchmarks.train.scale.record import Record


@dataclass(frozen=True)
class Report:
    """How rows of one kind are shown.

    Attributes:
        title: of the table.
        headings: of its columns.
        lines: of its rows.
        plots: how many stand side by side.
        draw: fills their axes.
    """

    title: str
    headings: tuple[str, ...]
    lines: Callable[[Record], list[Sequence[str]]]
    plots: Callable[[Record], int]
    draw: Callable[[Record, Any], None]

    def table(self, record: Record) -> Table:
        """The table, with the ceilings of the run below."""
        ceilings = record.data["ceilings"]
        caption = ""
        if ceilings:
            caption = (
                f"copy {record.copy_gb_per_s:.0f} GB/s (read + write), "
                f"matrix product {record.gemm_gflop_per_s / 1e3:.3g} TFLOP/s, in the same run"
            )
        table = Table(title=self.title, caption=caption)
        for heading in self.headings:
            table.add_column(heading)
        for line in self.lines(record):
            table.add_row(*line)
        return table

    def plot(self, record: Record) -> Path | None:
        """Draw beside the record; None when there is nothing measured to draw."""
        if not any(row["status"] == "measured" for row in record.rows):
            return None
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        count = self.plots(record)
        figure, axes = plt.subplots(1, count, figsize=(5.5 * count, 4), squeeze=False)
        self.draw(record, axes[0])
        figure.tight_layout()
        path = record.path.with_suffix(".png")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return path


def _contexts(record: Record) -> int:
    return len({row["case"]["context"] for row in record.rows})


def _cases(record: Record) -> int:
    return len({str(row["case"]) for row in record.rows})


REPORTS = {
    "decode": Report(
        "decoding", decode.headings(), decode.lines, _contexts, decode.draw
    ),
    "iteration": Report(
        "one RL iteration", iteration.headings(), iteration.lines, _cases, iteration.draw
    ),
    "stages": Report(
        "steps of the stages", stages.headings(), stages.lines, lambda record: 2, stages.draw
    ),
}  # fmt: skip
