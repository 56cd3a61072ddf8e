"""Two ranks: k-means with a rank that has no row, and revival, end at the same codebook."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latent_rl.nn import EmaCodebook, VectorQuantizer

STEPS = 12

RANK_SCRIPT = """
import sys, torch, torch.distributed as dist
from latent_rl.nn import EmaCodebook, VectorQuantizer
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(rank)
given = torch.load(f"{folder}/given.pt", weights_only=True)
book = EmaCodebook(8, 4, metric=given["metric"], decay=0.8, dead_below=0.5)
quantizer = VectorQuantizer(book).train()
for rows, cut in zip(given["rows"], given["cuts"]):
    quantizer(rows[:cut] if rank == 0 else rows[cut:], seed=0)
torch.save(book.state_dict(), f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


def data() -> Tensor:
    """Rows that jump far away after the first step: every code but the nearest is left behind."""
    rows = torch.randn(STEPS, 40, 4, generator=torch.Generator().manual_seed(5))
    rows[1:] += torch.tensor([30.0, -30.0, 30.0, 0.0])
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("first_cut", [0, 40, 13])
def test_kmeans_and_revival_agree_over_ranks(metric, first_cut, tmp_path: Path) -> None:
    cuts = [first_cut] + [(7 * step) % 41 for step in range(1, STEPS)]
    given = {"rows": data(), "cuts": cuts, "metric": metric}
    torch.save(given, tmp_path / "given.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, str(r), str(tmp_path)], env=environment
        )
        for r in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    alone = EmaCodebook(8, 4, metric=metric, decay=0.8, dead_below=0.5)
    quantizer = VectorQuantizer(alone).train()
    for rows in data():
        quantizer(rows, seed=0)
    if metric == "l2":
        # Without revival most codes would still lie where the first step's rows were.
        assert (torch.cdist(alone.weight, data()[-1]).min(1).values < 5).all()
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        # Sums of rows of length 50 are added in another order: float32's 1e-7 of them, with room.
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-4)
