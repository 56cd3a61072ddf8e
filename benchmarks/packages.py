"""The third-party packages that peers need, and how to get them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Package:
    """A peer's package: the module it is found by, its distributions and where to get it."""

    module: str
    distributions: tuple[str, ...]
    extra: str
    problem: Callable[[], str | None] = lambda: None

    def version(self) -> str:
        """Version of whichever distribution is installed, or ""."""
        for name in self.distributions:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return ""


def _faiss_without_gpu() -> str | None:
    """The CPU and the GPU build share one module name."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        return "the faiss installed is the CPU build"
    return None


PACKAGES = {
    "faiss-cpu": Package("faiss", ("faiss-cpu",), "bench"),
    "faiss-gpu": Package(
        "faiss",
        ("faiss-gpu-cuvs", "faiss-gpu", "faiss-gpu-cu12"),
        "bench-cuda",
        _faiss_without_gpu,
    ),
    "vector-quantize-pytorch": Package(
        "vector_quantize_pytorch", ("vector-quantize-pytorch",), "bench"
    ),
    "scikit-learn": Package("sklearn", ("scikit-learn",), "bench"),
    "flash-kmeans": Package("flash_kmeans", ("flash-kmeans",), "bench-cuda"),
    "cuvs": Package("cuvs", ("cuvs-cu13", "cuvs-cu12"), "bench-cuda"),
    "pylibraft": Package("pylibraft", ("pylibraft-cu13", "pylibraft-cu12"), "bench-cuda"),
    "flashinfer": Package("flashinfer", ("flashinfer-python",), "bench-cuda"),
    "triton": Package("triton", ("triton",), "triton"),
    "matplotlib": Package("matplotlib", ("matplotlib",), "bench"),
}


def why_absent(key: str) -> str | None:
    """Why a package cannot be used here, or None; "" stands for no package at all."""
    if not key:
        return None
    package = PACKAGES[key]
    if importlib.util.find_spec(package.module) is None:
        return f"{key} is not installed (pip install 'latent-rl[{package.extra}]')"
    return package.problem()


def versions() -> dict[str, str]:
    """Versions of the packages installed, for the record."""
    found = {key: package.version() for key, package in PACKAGES.items()}
    return {key: version for key, version in found.items() if version}
