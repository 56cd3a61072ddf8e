"""What a run has spent: completions, tokens, seconds and memory, counted alike in every arm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from latent_rl.ops.ranges import phase

__all__ = ["Spending", "SpendingMeter", "spending_of"]

PREFIX = "spent/"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Spending:
    """Totals of a run over all processes, rollouts that taught nothing included.

    Attributes:
        completions: sampled in training.
        generated_tokens: their tokens, ends included.
        rollout_seconds: of wall time in rollouts: generation, rewards, and whatever is computed
            once per rollout (old and reference log-probabilities).
        update_seconds: in the rest of the training steps.
        optimizer_steps: taken.
        peak_memory_bytes: most memory held since training began: on CUDA what torch allocated on
            the first process's device, else its resident memory; None where the system does not
            tell.
    """

    completions: int = 0
    generated_tokens: int = 0
    rollout_seconds: float = 0.0
    update_seconds: float = 0.0
    optimizer_steps: int = 0
    peak_memory_bytes: int | None = None


def spending_of(history: Sequence[Mapping[str, Any]]) -> Spending:
    """The totals in a trainer's ``state.log_history``.

    Raises:
        ValueError: when no entry has them.
    """
    for entry in reversed(history):
        if f"{PREFIX}completions" in entry:
            found = {f.name: entry.get(PREFIX + f.name) for f in fields(Spending)}
            return Spending(**{k: v for k, v in found.items() if v is not None})
    raise ValueError(f"spending_of: no entry of the log has {PREFIX}completions")


class SpendingMeter(TrainerCallback):
    """Times a trainer's rollouts and updates and counts what they make.

    A resumed run goes on from what a checkpoint holds of the meter (a stateful part), or, where the
    trainer keeps none, from the totals of its last log.
    """

    def __init__(self) -> None:
        self._peak = _PeakMemory()
        self._loaded = False
        self._restart(Spending())

    def _restart(self, before: Spending) -> None:
        self._seconds = [0.0, 0.0]  # rollout, update
        self._counts = [0, 0]  # completions, tokens
        self._since_log = [0.0, 0.0]
        self._rollouts = 0
        self._before = before

    def state_dict(self) -> dict[str, Any]:
        """Return this process's counts and times, and the totals they add to."""
        return {
            "seconds": self._seconds,
            "counts": self._counts,
            "since_log": self._since_log,
            "rollouts": self._rollouts,
            "before": asdict(self._before),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Go on from a state."""
        self._restart(Spending(**state_dict["before"]))
        self._seconds = list(state_dict["seconds"])
        self._counts = list(state_dict["counts"])
        self._since_log = list(state_dict["since_log"])
        self._rollouts = int(state_dict["rollouts"])
        self._loaded = True

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Around one rollout, normally inside :meth:`step`."""
        started = time.perf_counter()
        try:
            with phase("rollout"):
                yield
        finally:
            self._add(time.perf_counter() - started, 0.0)
            self._rollouts += 1

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step; what :meth:`rollout` takes of it is no update."""
        started, before = time.perf_counter(), self._seconds[0]
        try:
            # A rollout inside it is no update, here as in a timeline.
            with phase("update"):
                yield
        finally:
            rollout = self._seconds[0] - before
            self._add(0.0, time.perf_counter() - started - rollout)

    def count(self, completions: int, tokens: int) -> None:
        """Add completions of ``tokens`` tokens together, sampled by this process."""
        self._counts[0] += completions
        self._counts[1] += tokens

    def flush(
        self, steps: int, gather: Callable[[Tensor], Tensor], device: torch.device
    ) -> dict[str, float]:
        """Metrics for a log: seconds per rollout since the last one, and the totals.

        Args:
            steps: the optimizer has taken.
            gather: concatenates a tensor [n] of every process; all must call.
            device: of the processes' tensors.
        """
        counts = gather(torch.tensor([self._counts], device=device)).sum(0).tolist()
        logs: dict[str, float] = {}
        if self._rollouts:
            logs["rollout_seconds"] = self._since_log[0] / self._rollouts
            logs["update_seconds"] = self._since_log[1] / self._rollouts
        self._since_log, self._rollouts = [0.0, 0.0], 0
        before = self._before
        logs[f"{PREFIX}completions"] = before.completions + counts[0]
        logs[f"{PREFIX}generated_tokens"] = before.generated_tokens + counts[1]
        logs[f"{PREFIX}rollout_seconds"] = before.rollout_seconds + self._seconds[0]
        logs[f"{PREFIX}update_seconds"] = before.update_seconds + self._seconds[1]
        logs[f"{PREFIX}optimizer_steps"] = steps
        peak = self._peak.read(device)
        if peak is not None:
            logs[f"{PREFIX}peak_memory_bytes"] = max(peak, before.peak_memory_bytes or 0)
        return logs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from zero, or from the totals of the run that is continued."""
        continued = any(f"{PREFIX}completions" in entry for entry in state.log_history)
        if not self._loaded:
            self._restart(spending_of(state.log_history) if continued else Spending())
        self._loaded = False
        self._peak.reset(args.device)

    def _add(self, rollout: float, update: float) -> None:
        for sums in (self._seconds, self._since_log):
            sums[0] += rollout
            sums[1] += update


class _PeakMemory:
    """The most memory held since :meth:`reset`."""

    def __init__(self) -> None:
        self._known = False

    def reset(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._known = True
            return
        # Without a reset the figure would hold whatever the process did before training.
        try:
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
            self._known = True
        except OSError:
            self._known = False

    def read(self, device: torch.device) -> int | None:
        if not self._known:
            return None
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
