"""What a result must say about where it was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from latent_rl import __version__

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Machine:
    device: str
    cores: int
    load_1min: float
    threads: int
    driver: str
    python: str
    torch: str
    triton: str
    latent_rl: str
    commit: str

    @property
    def slug(self) -> str:
        """A file-name-safe name of the device."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
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


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit measured; ``-dirty`` when tracked files differ from it."""
    name = output_of("git", "rev-parse", "--short=12", "HEAD")
    return f"{name}-dirty" if output_of("git", "status", "--porcelain", "-uno") else name


def describe(device: torch.device, label: str = "") -> Machine:
    """What is measured on; ``label`` replaces a device name that says too little."""
    on_gpu = device.type == "cuda"
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Machine(
        device=label or (torch.cuda.get_device_name(device) if on_gpu else f"{cpu_name()} CPU"),
        cores=os.cpu_count() or 0,
        load_1min=os.getloadavg()[0],
        threads=torch.get_num_threads(),
        driver=driver if on_gpu else "",
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version_of("triton"),
        latent_rl=__version__,
        commit=commit(),
    )
