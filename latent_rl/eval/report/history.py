"""Training logs of a run, by step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Curve", "curves", "read_histories"]

_LOG, _STATE = "log.json", "trainer_state.json"
# What a reader looks for first, by the beginning of its name; the others follow in log order.
_FIRST = ("reward", "loss", "eval_reward", "eval_loss", "kl", "entropy", "frac_", "completions/")
# Counters and times that only grow or repeat another axis.
_LEFT_OUT = ("step", "epoch", "total_flos", "train_", "num_tokens", "learning_rate")


@dataclass(frozen=True)
class Curve:
    """One logged number over the steps of a training."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


def read_histories(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Log histories of a run directory, by the name of the step, in order.

    Known are directories of ``latent-rl train`` (``log.json`` in numbered steps), a single such
    step, and what a Trainer leaves (``trainer_state.json``, the one of the last checkpoint).

    Raises:
        ValueError: naming a file that is damaged.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    steps = sorted(path.parent for path in run.glob(f"*/{_LOG}") if path.parent.name[:1].isdigit())
    for step in steps or ([run] if (run / _LOG).is_file() else []):
        found[step.name] = _entries(step / _LOG, _json(step / _LOG))
    if found:
        return found
    state = _last_state(run)
    if state is not None:
        values = _json(state)
        entries = values.get("log_history") if isinstance(values, Mapping) else None
        found[run.resolve().name] = _entries(state, entries)
    return found


def curves(entries: Sequence[Mapping[str, Any]], *, limit: int = 12) -> tuple[list[Curve], int]:
    """Numbers of a history that have at least two values, the most telling ones first; and how
    many were left out beyond ``limit``."""
    points: dict[str, list[tuple[float, float]]] = {}
    for index, entry in enumerate(entries):
        step = entry.get("step", index)
        for name, value in entry.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and math.isfinite(value) and not name.startswith(_LEFT_OUT):
                points.setdefault(name, []).append((float(step), float(value)))
    names = [name for name, found in points.items() if len(found) > 1]
    names.sort(key=_rank)  # stable: log order within a rank
    made = [
        Curve(name, *(tuple(axis) for axis in zip(*points[name], strict=True)))
        for name in names[:limit]
    ]
    return made, max(0, len(names) - limit)


def _rank(name: str) -> int:
    return next((i for i, start in enumerate(_FIRST) if name.startswith(start)), len(_FIRST))


def _last_state(run: Path) -> Path | None:
    if (run / _STATE).is_file():
        return run / _STATE
    states = [path for path in run.glob(f"checkpoint-*/{_STATE}") if _step_of(path) is not None]
    return max(states, key=lambda path: _step_of(path) or 0, default=None)


def _step_of(state: Path) -> int | None:
    number = state.parent.name.rpartition("-")[2]
    return int(number) if number.isdigit() else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged log: {error}") from error


def _entries(path: Path, values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not all(isinstance(entry, dict) for entry in values):
        raise ValueError(f"{path}: damaged log: expected a list of objects")
    return values
