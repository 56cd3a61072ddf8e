"""latent-rl: reinforcement learning of image-text agents over a latent action codebook.

Importing this package is light: it loads neither torch nor transformers. The rooms below are
imported on first use (PEP 562), so ``latent_rl.ops.nearest_code`` works after a bare
``import latent_rl``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from latent_rl._version import __version__

_ROOMS = frozenset(
    {
        "backends",
        "cli",
        "config",
        "data",
        "decode",
        "demo",
        "eval",
        "kernels",
        "models",
        "native",
        "nn",
        "ops",
        "reference",
        "rewards",
        "train",
    }
)

__all__ = ["__version__"]


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
