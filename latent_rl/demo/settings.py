"""Settings of the demo, and the sizes that follow from its scale."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["ALGORITHMS", "TASKS", "DemoSettings"]

TASKS = ("role-play", "personalised")
ALGORITHMS = ("grpo", "dr_grpo", "dapo", "bnpo")


@dataclass(frozen=True)
class DemoSettings:
    """What a run of the demo depends on.

    Attributes:
        task: "both", "role-play" or "personalised".
        algorithm: loss of both RL arms: grpo, dr_grpo, dapo or bnpo.
        seed: of data, initialisation, training and rollouts.
        out: directory of everything the run makes.
        resume: continue a run of the same settings found in ``out``; otherwise start over.
        scale: factor on every number of steps; below 1 the demo is a smoke test, not a result.
    """

    task: str = "both"
    algorithm: str = "grpo"
    seed: int = 0
    out: Path = Path("runs/demo")
    resume: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for a task, algorithm or scale that does not exist."""
        if self.task not in ("both", *TASKS):
            raise ValueError(f"task must be both, {' or '.join(TASKS)}, got {self.task!r}")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(
                f"algorithm must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}"
            )
        if not 0 < self.scale <= 10:
            raise ValueError(f"scale must lie in (0, 10], got {self.scale}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that RL is run on."""
        return TASKS if self.task == "both" else (self.task,)

    def steps(self, full: int, least: int = 2) -> int:
        """``full`` steps at scale 1."""
        return max(least, round(full * self.scale))

    def as_dict(self) -> dict[str, object]:
        """Plain values, for manifests and reports."""
        return {**asdict(self), "out": str(self.out)}

    def fingerprint(self) -> str:
        """Identifies what results depend on; runs that differ in it never mix."""
        relevant = {k: v for k, v in self.as_dict().items() if k not in ("out", "resume")}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]
