"""A copy of the project that can be broken, rebuilt and tested without touching the original."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE_FOLDERS = ("csrc", "kernels/common")
# What pytest exits with when tests ran and at least one failed; anything else is no verdict.
TESTS_FAILED = 1


@dataclass(frozen=True)
class Mutation:
    """One break.

    Attributes:
        name: op and what is broken.
        path: the file, from the project's root.
        old: text that stands in it exactly once.
        new: what replaces it.
        tests: pytest arguments, at least one of which must turn red.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    def source(self, root: Path) -> str:
        """The file's text.

        Raises:
            ValueError: unless ``old`` stands in it exactly once (the table is out of date).
        """
        text = (root / self.path).read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: {self.path} must contain {self.old!r} once, "
                f"found {text.count(self.old)}"
            )
        return text

    @property
    def needs_build(self) -> bool:
        return self.path.startswith(NATIVE_FOLDERS) and not self.path.endswith(".py")


class Copy:
    """The project's files in ``folder``, with an environment that imports them from there."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "project"
        self._build_folder = folder / "build"
        self._python = folder / "env" / "bin" / "python"
        self._copy_files()
        self._make_environment(folder / "env")
        self.build()

    def _copy_files(self) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                target = self.root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        # An installed package shows the device code here.
        (self.root / "latent_rl" / "kernels").symlink_to(self.root / "kernels")

    def _make_environment(self, folder: Path) -> None:
        """An environment of its own: path files put the copy before an installed latent_rl."""
        venv.create(folder, with_pip=False)
        (site,) = (folder / "lib").glob("python*/site-packages")
        shared = [p for p in sys.path if p.endswith("site-packages") and Path(p).is_dir()]
        (site / "copy.pth").write_text("\n".join([str(self.root), *shared]) + "\n")

    def build(self) -> None:
        """Compile the extension (incrementally).

        Raises:
            RuntimeError: with the compiler's words, when it does not compile.
        """
        # Tools of this environment (cmake, ninja) may not be on PATH.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        pybind = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"],
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
        steps = (
            ["cmake", "-S", str(self.root), "-B", str(self._build_folder), "-G", "Ninja",
             "-DCMAKE_BUILD_TYPE=Release", "-DLATENT_RL_CUDA=OFF", f"-Dpybind11_DIR={pybind}",
             f"-DPython_EXECUTABLE={sys.executable}"],
            ["cmake", "--build", str(self._build_folder)],
        )  # fmt: skip
        for command in steps:
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "PATH": path}
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        for built in self._build_folder.glob("_C*.so"):
            shutil.copy2(built, self.root / "latent_rl" / built.name)

    def run(self, tests: tuple[str, ...]) -> tuple[int, str]:
        """Exit code and output of pytest."""
        done = subprocess.run(
            [self._python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=self.root,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return done.returncode, done.stdout + done.stderr

    def caught_by(self, mutation: Mutation) -> str | None:
        """Apply, test, undo: the first test that failed, or None when all stayed green.

        Raises:
            RuntimeError: when the broken project does not build or pytest cannot run its tests.
        """
        file = self.root / mutation.path
        text = mutation.source(self.root)
        file.write_text(text.replace(mutation.old, mutation.new))
        try:
            if mutation.needs_build:
                self.build()
            code, output = self.run(mutation.tests)
        finally:
            file.write_text(text)
            if mutation.needs_build:
                self.build()
        if code == 0:
            return None
        if code != TESTS_FAILED:
            raise RuntimeError(f"{mutation.name}: pytest exited with {code}\n{output[-3000:]}")
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed[0].split(" - ")[0] if failed else "a test failed"
