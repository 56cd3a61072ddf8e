"""What a result must say about where it was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.packages import versions
from latent_rl import __version__

ROOT = Path(__file__).resolve().parent.parent
# Files whose edits cannot change a timing: a run may write them.
IRRELEVANT = (":!benchmarks/results", ":!docs", ":!*.md")


@dataclass(frozen=True)
class Machine:
    """A device, its software and the commit measured.

    ``clocks`` are the highest a GPU allows; they are not locked: what they were under load stands
    beside the roofs.
    """

    device: str
    cores: int
    load_1min: float
    driver: str
    clocks: str
    python: str
    torch: str
    latent_rl: str
    commit: str
    dirty: bool
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """A file-name-safe name of the device."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    @property
    def version(self) -> str:
        """The commit, ``-dirty`` when files that matter differ from it."""
        return f"{self.commit}-dirty" if self.dirty else self.commit

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def output_of(*command: str) -> str:
    """First line a command prints, or "" where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def gpu(query: str) -> str:
    return output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def describe(device: torch.device, label: str = "", commit: str = "") -> Machine:
    """What is measured on.

    ``label`` replaces a device name that says too little; ``commit`` is taken where there is no
    history to ask, as in a copy of a checkout.
    """
    on_gpu = device.type == "cuda"
    changed = output_of("git", "status", "--porcelain", "-uno", "--", ".", *IRRELEVANT)
    return Machine(
        device=label or (torch.cuda.get_device_name(device) if on_gpu else f"{cpu_name()} CPU"),
        cores=os.cpu_count() or 0,
        load_1min=os.getloadavg()[0],
        driver=gpu("driver_version") if on_gpu else "",
        clocks=gpu("clocks.max.sm,clocks.max.mem") if on_gpu else "",
        python=platform.python_version(),
        torch=torch.__version__,
        latent_rl=__version__,
        commit=output_of("git", "rev-parse", "--short=12", "HEAD") or commit[:12] or "unknown",
        dirty=bool(changed),
        packages=versions(),
    )
