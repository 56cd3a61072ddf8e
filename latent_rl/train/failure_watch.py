"""Stopping a run whose rewards fail: it would burn rollouts (and a judge's money) for nothing."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from latent_rl.rewards.failures import RewardStop, count_by_kind

if TYPE_CHECKING:
    from latent_rl.rewards.failures import RewardFailure
    from latent_rl.train.rollout import Rollout

__all__ = ["MAX_FAILED_ROLLOUTS", "FailureWatch"]

MAX_FAILED_ROLLOUTS = 3
MAX_REASONS = 3

GatherTensor: TypeAlias = "Callable[[Tensor], Tensor]"
GatherObjects: TypeAlias = "Callable[[list[Any]], list[Any]]"


class FailureWatch:
    """Counts failed rewards over the last rollouts of all processes, and stops the run past a rate.

    max_rate  share of the window's completions on which some reward function failed, above which
              the run stops; None never stops for a rate
    window    rollouts that count. Before so many were made no rate stops the run: a judge that
              starts up slowly must not end it.

    Whatever the rate, `MAX_FAILED_ROLLOUTS` rollouts in a row without a single reward stop it.

    `None` ("does not apply") is no failure. `add` or `count` is called for all that was
    scored, also what dynamic sampling replaced; `check` once per rollout and on every process,
    so that all of them stop at the same point.
    """

    def __init__(self, max_rate: float | None, window: int) -> None:
        self.max_rate = max_rate
        self._window: deque[tuple[int, int]] = deque(maxlen=window)  # (scored, failed)
        self._kinds: deque[Counter[str]] = deque(maxlen=window)  # of this process
        self.reset()

    def reset(self) -> None:
        """Forget everything, as at the start of a run."""
        self._window.clear()
        self._kinds.clear()
        self._without_reward = 0
        self._reasons: list[str] = []
        self._begin()

    def _begin(self) -> None:
        self._scored = self._failed = self._kept = 0
        self._now: Counter[str] = Counter()

    def add(self, rollout: Rollout) -> None:
        """Count a scored rollout, or a part of one, of this process."""
        failed = int(rollout.failed.any(1).sum())
        self.count(len(rollout), failed, int(rollout.keep_mask.sum()), rollout.failures)

    def count(self, scored: int, failed: int, kept: int, failures: Sequence[RewardFailure]) -> None:
        """Count scored completions of this process, those a function failed on, and those kept."""
        self._scored += scored
        self._failed += failed
        self._kept += kept
        self._now += count_by_kind(failures)
        for failure in failures:
            if failure.message not in self._reasons:
                self._reasons = [*self._reasons, failure.message][-MAX_REASONS:]

    def check(self, gather: GatherTensor, gather_objects: GatherObjects, device: Any) -> None:
        """Close the rollout and stop the run if its rewards fail too often.

        gather, gather_objects: join a tensor [3] or a list of every process.

        Raises:
            RewardStop: naming how many failed, by kind, with examples.
        """
        here = torch.tensor([[self._scored, self._failed, self._kept]], device=device)
        scored, failed, kept = gather(here).sum(0).tolist()
        self._window.append((scored, failed))
        self._kinds.append(self._now)
        self._without_reward = 0 if kept else self._without_reward + 1
        self._begin()
        if self._without_reward >= MAX_FAILED_ROLLOUTS:
            raise RewardStop(
                f"every reward of {MAX_FAILED_ROLLOUTS} rollouts in a row failed: "
                f"{self._explained(gather_objects)}"
            )
        if self.max_rate is None or len(self._window) < (self._window.maxlen or 0):
            return
        total = sum(n for n, _ in self._window)
        lost = sum(n for _, n in self._window)
        if lost > self.max_rate * total:
            raise RewardStop(
                f"rewards failed on {lost} of {total} completions ({100 * lost / total:.0f} %) of "
                f"the last {len(self._window)} rollouts, above max_reward_failure_rate="
                f"{self.max_rate:g}: {self._explained(gather_objects)}"
            )

    def _explained(self, gather_objects: GatherObjects) -> str:
        """Counts by kind and examples, of all processes."""
        counts: Counter[str] = Counter()
        for kinds in gather_objects([dict(kinds) for kinds in self._kinds]):
            counts.update(kinds)
        reasons = list(dict.fromkeys(gather_objects(list(self._reasons))))[-MAX_REASONS:]
        if not counts:
            return "no reward function applied"
        listed = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
        return f"{listed}; for example: {'; '.join(reasons)}"

    # A resumed run must stop where the uninterrupted one would have.

    def state_dict(self) -> dict[str, Any]:
        """Return the window, with this process's kinds and reasons."""
        return {
            "window": [list(counts) for counts in self._window],
            "kinds": [dict(kinds) for kinds in self._kinds],
            "without_reward": self._without_reward,
            "reasons": list(self._reasons),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take over what `state_dict` returned."""
        window: Sequence[Sequence[int]] = state_dict["window"]
        self._window = deque(
            ((int(scored), int(failed)) for scored, failed in window), self._window.maxlen
        )
        self._kinds = deque((Counter(kinds) for kinds in state_dict["kinds"]), self._kinds.maxlen)
        self._without_reward = int(state_dict["without_reward"])
        self._reasons = list(state_dict["reasons"])
        self._begin()
