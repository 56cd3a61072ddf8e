"""Builds that several packaging tests look at, each made once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], *, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Output of a command; a failure shows all of it."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def source_copy(to: Path) -> Path:
    """The tree without what builds and runs leave in it, so that a build cannot use any of that."""
    ignored = shutil.ignore_patterns(
        ".git", "build", "dist", "__pycache__", ".*_cache", "*.so", ".venv", "venv", "runs"
    )
    shutil.copytree(ROOT, to, ignore=ignored)
    return to


@dataclass(frozen=True)
class Built:
    """A wheel, what the build printed, and the folder it was unpacked into."""

    wheel: Path
    log: str
    site: Path

    @property
    def extension(self) -> Path:
        return next((self.site / "latent_rl").glob("_C.*.so"))


def build_wheel(source: Path, work: Path, cuda: str) -> Built:
    """Builds a wheel of `source` and installs it, alone, into a folder of its own."""
    work.mkdir(parents=True)
    log = run(
        [
            sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
            "--no-index", "--verbose", "--wheel-dir", str(work), str(source),
            f"-Ccmake.define.LATENT_RL_CUDA={cuda}", f"-Cbuild-dir={work / 'build'}",
            "-Cbuild.verbose=true",
        ],
        cwd=work,
        env={"CMAKE_BUILD_PARALLEL_LEVEL": "2"},
    )  # fmt: skip
    wheel = next(work.glob("*.whl"))
    site = work / "site"
    run(
        [
            sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile",
            "--target", str(site), str(wheel),
        ],
        cwd=work,
    )  # fmt: skip
    return Built(wheel, log, site)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a clean copy of the tree."""
    work = tmp_path_factory.mktemp("sdist")
    source = source_copy(work / "tree")
    run(
        [
            sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(work),
            str(source),
        ],
        cwd=work,
    )  # fmt: skip
    return next(work.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def cpu_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A wheel without CUDA, built from the unpacked source distribution."""
    work = tmp_path_factory.mktemp("cpu")
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    source = next(path for path in work.iterdir() if path.is_dir())
    return build_wheel(source, work / "wheel", "OFF")


@pytest.fixture(scope="session")
def cuda_wheel(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A wheel with CUDA, built from a clean copy of the tree."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    work = tmp_path_factory.mktemp("cuda")
    return build_wheel(source_copy(work / "tree"), work / "wheel", "ON")
