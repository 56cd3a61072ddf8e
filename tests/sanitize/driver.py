"""Calls one op's CUDA and Triton rows at shapes that are easy to get wrong: what a tool watches.

``python -m tests.sanitize.driver OP`` ends by saying how many calls it made; a process that does
not say so has not finished, whatever the tool reports.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping

import torch

from latent_rl import backends
from tests.ops.every_op import EVEN, EVERY_OP, NO_FLOAT32, ODD, OpCase
from tests.ops.every_op_checks import poisoned_inputs, with_gradients

DONE = "sanitize driver: calls made:"
# The last is past the tiles and the shared memory that small codebooks fit in.
SIZES: tuple[Mapping[str, int], ...] = (
    {"K": 1, "D": 1, "I": 1},
    ODD,
    EVEN,
    {"K": 2100, "D": 72, "I": 40},
)
ROWS = (1, 37, 130)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def calls(op: str) -> Iterator[tuple[OpCase, str, torch.dtype, Mapping[str, int], int]]:
    """Every call of an op: case, row of the dispatch table, dtype, sizes, rows."""
    for case in (case for case in EVERY_OP if case.op == op):
        for row in case.cuda_rows:
            for dtype in DTYPES:
                if dtype == torch.float32 and (op, row) in NO_FLOAT32:
                    continue
                for sizes in SIZES:
                    for rows in ROWS:
                        yield case, row, dtype, sizes, rows


def run(op: str, device: torch.device) -> int:
    """Make the calls, forward and backward, with healthy and with broken rows.

    Returns:
        How many were made.
    """
    made = 0
    for case, row, dtype, sizes, rows in calls(op):
        os.environ[backends.ENVIRONMENT_VARIABLE] = f"{op}={row}"
        t = case.inputs(rows, device, dtype, sizes=sizes)
        with_gradients(case, t)
        for broken in poisoned_inputs(case, t, torch.tensor([rows // 2], device=device)):
            with_gradients(case, broken)
        made += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=backends.OPS)
    print(DONE, run(parser.parse_args().op, torch.device("cuda")), flush=True)


if __name__ == "__main__":
    main()
