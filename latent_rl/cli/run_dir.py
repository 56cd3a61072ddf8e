"""The directory of a training run: one numbered directory per finished step, written whole.

A step works in `.<name>.partial` and is renamed to `<name>` when done, so a directory under its
final name is complete, and an interrupted step continues from its own checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_rl.cli.errors import UserError

__all__ = ["RunDirectory", "checkpoint_in", "fingerprint"]

_RECORD = "step.json"
_CHECKPOINT = "latent_config.json"
_STEP = re.compile(r"^\d\d-\w+$")


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A digest of settings, equal for equal settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checkpoint_in(path: Path) -> Path:
    """The checkpoint a path means: itself, or the last finished step of a run.

    Raises:
        UserError: when there is none.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint")
    if (path / _CHECKPOINT).is_file():
        return path
    steps = sorted(p for p in path.iterdir() if _STEP.match(p.name) and (p / _CHECKPOINT).is_file())
    if not steps:
        raise UserError(f"{path}: holds neither {_CHECKPOINT} nor a finished step of a run")
    return steps[-1]


class RunDirectory:
    """Finished and unfinished steps below one directory; nothing is created before it is needed."""

    def __init__(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise UserError(f"{root}: is not a directory")
        self.root = root

    def final(self, step: str) -> Path:
        """Where a finished step lies."""
        return self.root / step

    def work(self, step: str) -> Path:
        """Where an unfinished step works."""
        return self.root / f".{step}.partial"

    def is_finished(self, step: str, expected: str) -> bool:
        """Whether a step was finished with these settings.

        Raises:
            UserError: when it was finished with others.
        """
        return self._matches(self.final(step), expected)

    def start(self, step: str, expected: str, *, resume: bool) -> Path:
        """Make the step's work directory, keeping an earlier one only to resume the same step."""
        work = self.work(step)
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        self._matches(work, expected)
        work.mkdir(parents=True, exist_ok=True)
        (work / _RECORD).write_text(json.dumps({"fingerprint": expected}), encoding="utf-8")
        return work

    def abandon(self, step: str) -> None:
        """Remove the work directory of a step that failed with nothing to continue from."""
        work = self.work(step)
        if work.is_dir() and not any(work.glob("checkpoint-*")):
            shutil.rmtree(work)
        if self.root.is_dir() and not any(self.root.iterdir()):
            self.root.rmdir()

    def finish(self, step: str, prepared: Path) -> Path:
        """Put a prepared directory (on the same disk) in the step's place and clean up."""
        final, old = self.final(step), self.root / f".{step}.old"
        shutil.copyfile(self.work(step) / _RECORD, prepared / _RECORD)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        prepared.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.work(step), ignore_errors=True)
        return final

    def _matches(self, directory: Path, expected: str) -> bool:
        record = directory / _RECORD
        if not record.is_file():
            return False
        found = json.loads(record.read_text(encoding="utf-8")).get("fingerprint")
        if found != expected:
            raise UserError(
                f"{directory}: was made with other settings; "
                "use --no-resume to replace it, or another --out"
            )
        return True
