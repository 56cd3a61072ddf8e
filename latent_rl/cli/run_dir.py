"""The directory of a training run: one numbered directory per finished step, written whole.

A step works in `.<name>.partial` and is renamed to `<name>` when done, so a directory under its
final name is complete, and an interrupted step continues from its own checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latent_rl.cli.errors import UserError
from latent_rl.train.checkpoint_files import flush
from latent_rl.train.run_lock import run_lock

__all__ = [
    "RunDirectory",
    "checkpoint_in",
    "content_fingerprint",
    "fingerprint",
    "weights_fingerprint",
]

_RECORD = "step.json"
_CHECKPOINT = "latent_config.json"
_STEP = re.compile(r"^\d\d-\w+$")
# Beside the steps: work (.partial), what is being replaced (.old), and mkdtemp's names.
_LEFT = re.compile(r"^\.(?P<step>\d\d-\w+)\.(?:(?P<kind>partial|old)|\w+)$")
_LOGS = ("completions", "runs")
_BAD = "bad_batch-*"


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A digest of settings, equal for equal settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_fingerprint(path: Path) -> str | None:
    """A digest of a file's bytes, or None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def weights_fingerprint(directory: Path) -> str:
    """A digest of all weights below a directory; their settings and the place do not enter it."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.safetensors")):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(directory)} {content}\n".encode())
    return digest.hexdigest()[:16]


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

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the directory to this run, first removing what a killed one left half done.

        Raises:
            RunInUseError: another run is at work in it.
        """
        try:
            with run_lock(self.root):
                for path in self.root.iterdir():
                    step = _LEFT.match(path.name)
                    # What was being put in place, and the work of a step that is in place.
                    if step and (step["kind"] is None or self.final(step["step"]).is_dir()):
                        shutil.rmtree(path, ignore_errors=True)
                yield
        finally:
            if self.root.is_dir() and not any(self.root.iterdir()):
                self.root.rmdir()

    def abandon(self, step: str) -> None:
        """Remove the work directory of a step that failed with nothing to continue from and
        nothing to look at."""
        work = self.work(step)
        if work.is_dir() and not any(any(work.glob(kept)) for kept in ("checkpoint-*", _BAD)):
            shutil.rmtree(work)

    def finish(self, step: str, prepared: Path) -> Path:
        """Put a prepared directory (on the same disk) in the step's place, with what the work has
        logged, and clean up."""
        final, old = self.final(step), self.root / f".{step}.old"
        shutil.copyfile(self.work(step) / _RECORD, prepared / _RECORD)
        for name in _LOGS:
            if (self.work(step) / name).is_dir():
                shutil.copytree(self.work(step) / name, prepared / name, dirs_exist_ok=True)
        for path in (*prepared.rglob("*"), prepared):
            flush(path)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        prepared.rename(final)
        flush(self.root)
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
                f"{directory}: was made with other settings or other data; "
                "use --no-resume to replace it, or another --out"
            )
        return True
