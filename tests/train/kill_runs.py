"""Training runs that tests kill: the side that asks (see kill_child.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL


class Runs:
    """Training runs, each a process; `directory` gets what they write to stderr."""

    def __init__(self, directory: Path) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.errors = directory / "stderr"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.kill_child"],
            cwd=ROOT,
            env={**os.environ, **threads, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
        )

    def ask(self, kind: str, out: Path, **request) -> tuple[int, float]:
        """Train to the end or the kill, continuing what `out` holds; the status and seconds."""
        out.mkdir(exist_ok=True)
        line = json.dumps({"kind": kind, "out": str(out), **request})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["seconds"]

    def finish(self, kind: str, out: Path, **request) -> float:
        status, seconds = self.ask(kind, out, **request)
        assert status == 0, self.errors.read_text()[-3000:]
        return seconds

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(60) == 0
