"""The directory of a run: where every step keeps what it made, and what is done already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from latent_rl.demo.settings import DemoSettings
from latent_rl.eval.writing import write_json

__all__ = ["Workspace"]

_MANIFEST = "manifest.json"
_FORMAT = 1


class Workspace:
    """Paths within ``settings.out`` and the manifest of finished steps.

    A step counts as done once its record stands in the manifest, which is replaced in one piece;
    a step that was interrupted runs again (its trainer resumes from its own checkpoints).
    """

    def __init__(self, settings: DemoSettings) -> None:
        """Open or make the directory.

        Raises:
            ValueError: when it holds a run of other settings, or no run of the demo at all but
                other files, and ``settings.resume`` does not say to replace a run.
        """
        self.settings = settings
        self.root = settings.out.resolve()
        self._records: dict[str, dict[str, Any]] = {}
        manifest = self.root / _MANIFEST
        if manifest.is_file():
            if settings.resume:
                self._open(manifest)
                return
            shutil.rmtree(self.root)
        elif self.root.exists() and any(self.root.iterdir()):
            raise ValueError(f"out: {settings.out} holds files that are no run of the demo")
        self.root.mkdir(parents=True, exist_ok=True)
        self._write()

    def _open(self, manifest: Path) -> None:
        try:
            stored = json.loads(manifest.read_text(encoding="utf-8"))
            fingerprint, self._records = stored["fingerprint"], stored["steps"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"out: {manifest} is damaged: {error!r}; use --no-resume") from error
        if fingerprint != self.settings.fingerprint():
            raise ValueError(
                f"out: {self.settings.out} holds a run of other settings ({stored['settings']}); "
                "choose another --out or --no-resume"
            )

    def _write(self) -> None:
        write_json(
            self.root / _MANIFEST,
            {
                "format": _FORMAT,
                "fingerprint": self.settings.fingerprint(),
                "settings": self.settings.as_dict(),
                "steps": self._records,
            },
        )

    def path(self, *parts: str) -> Path:
        """A path within the run."""
        return self.root.joinpath(*parts)

    def is_done(self, step: str) -> bool:
        """Whether an earlier run, or this one, finished the step."""
        return step in self._records

    def record(self, step: str) -> dict[str, Any]:
        """What a finished step left for later ones."""
        return self._records[step]

    def finish(self, step: str, record: dict[str, Any]) -> None:
        """Mark a step as done; ``record`` holds plain values, among them ``seconds``."""
        self._records[step] = record
        self._write()

    def seconds(self) -> dict[str, float]:
        """Wall seconds of every finished step, in order."""
        return {name: float(record["seconds"]) for name, record in self._records.items()}
