"""`latent-rl bench`: hands over to the benchmarks of a source checkout."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import latent_rl
from latent_rl.cli.errors import UserError

__all__ = ["run_bench"]


def run_bench(arguments: list[str]) -> int:
    """Run ``python -m benchmarks`` of the checkout this package is imported from.

    Raises:
        UserError: when the package is not imported from a checkout.
    """
    root = Path(latent_rl.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise UserError(
            "bench: the benchmarks are not part of an installed package; run it in a source "
            "checkout installed with `pip install -e .`"
        )
    sys.path.insert(0, str(root))
    benchmarks = importlib.import_module("benchmarks.__main__").app
    result = benchmarks(arguments or ["--help"], prog_name="latent-rl bench", standalone_mode=False)
    return result if isinstance(result, int) else 0
