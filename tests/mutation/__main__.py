"""``python -m tests.mutation [WORD]``: all mutations, or those whose name contains WORD."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.mutation.runner import Copy, Mutation
from tests.mutation.table import MUTATIONS


def main() -> int:
    """Exit code: 0 when every mutation was caught, 1 when one survived, 2 for a red start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="part of the names to run")
    word = parser.parse_args().word
    chosen = [mutation for mutation in MUTATIONS if word in mutation.name]
    if not chosen:
        parser.error(f"no mutation is named like {word!r}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        code, output = copy.run(tuple(sorted({t for m in chosen for t in m.tests})))
        if code:
            print(output[-3000:])
            print("the tests are red before anything is broken")
            return 2
        survivors = [m.name for m in chosen if not report(copy, m)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    return 1 if survivors else 0


def report(copy: Copy, mutation: Mutation) -> bool:
    """Run one mutation and say what became of it."""
    started = time.monotonic()
    caught = copy.caught_by(mutation)
    verdict = f"caught by {caught}" if caught else "SURVIVED"
    print(f"{mutation.name}: {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    return caught is not None


if __name__ == "__main__":
    sys.exit(main())
