"""`latent-rl demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from latent_rl.cli.errors import UserError

__all__ = ["run_demo"]

# Package on the index -> module it brings.
_NEEDS = {
    "scikit-learn": "sklearn",
    "chatterbot-corpus": "chatterbot_corpus",
    "matplotlib": "matplotlib",
    "trl": "trl",
}


def run_demo(
    task: str, algorithm: str, seed: int, out: Path, *, resume: bool, scale: float
) -> None:
    """Check the request, then run the demo.

    Raises:
        UserError: for a missing package, an unknown algorithm or an unusable directory.
    """
    missing = [
        package for package, module in _NEEDS.items() if not importlib.util.find_spec(module)
    ]
    if missing:
        raise UserError(
            f"demo: needs {', '.join(missing)}; install with `pip install 'latent-rl[demo]'`"
        )
    if not scale > 0:
        raise UserError(f"demo: --scale must be > 0, got {scale}")
    if out.exists() and not out.is_dir():
        raise UserError(f"demo: --out {out} is not a directory")

    from latent_rl import demo
    from latent_rl.demo.settings import ALGORITHMS

    if algorithm not in ALGORITHMS:
        known = ", ".join(sorted(ALGORITHMS))
        raise UserError(
            f"demo: unknown algorithm {algorithm!r}; both arms can be trained with {known}"
        )

    demo.run(
        demo.DemoSettings(
            task=task, algorithm=algorithm, seed=seed, out=out, resume=resume, scale=scale
        )
    )
