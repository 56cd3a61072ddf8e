"""Builds the CUDA sources of an op for the emulator, once per state of the sources.

Two libraries: the kernels with the emulator, so that its only thread-local variables are the
kernels' shared ones, and on top of it a module with the very bindings of ``latent_rl._C``.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "emulator"
COMPILER = "g++"
# No contraction: a multiplication and an addition round twice in every build, so results repeat.
COMMON = ["-std=c++17", "-fPIC", "-shared", "-g1", "-ffp-contract=off", "-DLATENT_RL_EMULATED"]
KERNELS = [
    *COMMON,
    "-O1",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    # longjmp from one stack to another is what fibers are.
    "-U_FORTIFY_SOURCE",
    # Checked by handlers of the emulator, without the compiler's library.
    "-fsanitize=alignment,bounds,shift",
    "-fno-sanitize-recover=all",
    "-Wl,-z,defs",
]
BINDINGS = [*COMMON, "-O0", "-fvisibility=hidden"]
INCLUDES = [HERE, HERE / "include", ROOT / "kernels", ROOT / "csrc"]


def _fingerprint(sources: list[Path]) -> str:
    """Of everything a build may read, so that an edited header is never missed."""
    read = {*sources, *HERE.rglob("*.h"), *HERE.rglob("*.cpp")}
    read |= {*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h")}
    read |= {path for path in (ROOT / "kernels").rglob("*") if path.suffix in {".h", ".cuh"}}
    digest = hashlib.sha256(repr((KERNELS, BINDINGS, pybind11.__version__)).encode())
    for path in sorted(read):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(arguments: list[str]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{COMPILER} {' '.join(arguments)}\n{done.stderr}")


@dataclass(frozen=True)
class Part:
    """A CUDA source and its bindings, which define ``latent_rl::bind_<name>_cuda``."""

    name: str
    kernel: Path
    bindings: Path


def build(name: str, parts: tuple[Part, ...]) -> Path:
    """Path of module ``emulated_<name>`` with the bindings of every part."""
    module = f"emulated_{name}"
    kernels = [part.kernel for part in parts]
    bindings = [part.bindings for part in parts]
    folder = CACHE / f"{name}-{_fingerprint(kernels + bindings)}"
    target = folder / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # Two test processes may want the same build.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        includes = [f"-I{path}" for path in INCLUDES]
        library = folder / f"lib{module}_kernels.so"
        sources = [str(path) for path in (HERE / "runtime.cpp", HERE / "hopper.cpp", *kernels)]
        _compile([*KERNELS, *includes, "-x", "c++", *sources, "-o", str(library)])
        python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        binds = "".join(f"BIND({part.name})" for part in parts)
        names = [f"-DLATENT_RL_EMULATED_NAME={module}", f"-DLATENT_RL_EMULATED_PARTS={binds}"]
        link = [f"-L{folder}", f"-l{library.stem.removeprefix('lib')}", "-Wl,-rpath,$ORIGIN"]
        partial = target.with_suffix(".partial")
        sources = [str(path) for path in (HERE / "module.cpp", *bindings)]
        _compile([*BINDINGS, *includes, *python, *names, *sources, "-o", str(partial), *link])
        partial.rename(target)
    return target


@functools.cache
def load(name: str, parts: tuple[Part, ...]) -> ModuleType:
    """The module, built where it must be."""
    path = build(name, parts)
    spec = importlib.util.spec_from_file_location(f"emulated_{name}", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"no module can be loaded from {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_rooms(*rooms: str) -> ModuleType:
    """The CUDA bindings of rooms of ``kernels/``, on the emulator."""
    parts = tuple(
        Part(room, ROOT / "kernels" / room / "cuda_impl.cu", ROOT / "csrc" / "cuda" / f"{room}.cpp")
        for room in rooms
    )
    return load("_".join(rooms), parts)
