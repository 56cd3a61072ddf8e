"""Codebooks: moving averages by hand, k-means, revival, ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latent_rl.nn import Codebook, EmaCodebook, VectorQuantizer


def clusters(centers: Tensor, each: int, noise: float = 0.05, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    rows = centers.repeat_interleave(each, 0)
    rows = rows + noise * torch.randn(rows.shape, generator=draw)
    return rows[torch.randperm(rows.shape[0], generator=draw)]


def plain(k: int, d: int, **settings: object) -> EmaCodebook:
    """No k-means and no revival unless asked for: the moving average alone."""
    defaults = {"kmeans_iterations": 0, "dead_below": 0.0, **settings}
    return EmaCodebook(k, d, **defaults)  # type: ignore[arg-type]


def test_moving_average_by_hand() -> None:
    book = plain(2, 1, decay=0.75)
    book._set(torch.tensor([[0.0], [10.0]]), torch.tensor([2.0, 2.0]))
    quantizer = VectorQuantizer(book).train()
    quantizer(torch.tensor([[1.0], [3.0], [9.0]]), seed=0)
    # counts: .75*2 + .25*(2, 1); sums: .75*(0, 20) + .25*(4, 9)
    torch.testing.assert_close(book.ema_counts, torch.tensor([2.0, 1.75]))
    torch.testing.assert_close(book.weight, torch.tensor([[1.0 / 2.0], [17.25 / 1.75]]))


def test_eval_mode_learns_nothing() -> None:
    book = EmaCodebook(4, 3)
    before = {name: value.clone() for name, value in book.state_dict().items()}
    VectorQuantizer(book).eval()(torch.randn(20, 3), seed=0)
    for name, value in book.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_unused_codes_keep_their_place() -> None:
    book = plain(3, 2, decay=0.0)
    book._set(torch.tensor([[0.0, 0.0], [5.0, 5.0], [50.0, 50.0]]), torch.ones(3))
    VectorQuantizer(book).train()(torch.tensor([[0.1, 0.0], [5.0, 5.2]]), seed=0)
    torch.testing.assert_close(book.weight[2], torch.tensor([50.0, 50.0]))
    assert book.weight.isfinite().all()


def test_kmeans_finds_separated_clusters() -> None:
    centers = 10 * torch.eye(6)
    book = EmaCodebook(6, 6, seed=3)
    book.observe(clusters(centers, 40))
    assert bool(book.initialised)
    gap = torch.cdist(centers, book.weight)
    assert sorted(gap.argmin(1).tolist()) == list(range(6))
    assert gap.min(1).values.max() < 0.1
    torch.testing.assert_close(book.ema_counts, torch.full((6,), 40.0))


def test_kmeans_repeats_and_runs_once() -> None:
    rows = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))
    first, second = EmaCodebook(8, 4), EmaCodebook(8, 4)
    first.observe(rows)
    torch.manual_seed(99)  # the global generator has no say
    second.observe(rows)
    assert torch.equal(first.weight, second.weight)
    first.observe(rows + 100)
    assert torch.equal(first.weight, second.weight)


def test_kmeans_with_fewer_rows_than_codes_gives_distinct_codes() -> None:
    book = EmaCodebook(16, 3)
    book.observe(torch.randn(5, 3))
    assert book.weight.unique(dim=0).shape[0] == 16
    assert book.weight.isfinite().all()


def test_kmeans_moves_empty_clusters_to_rows_served_worst() -> None:
    # Nearly every random start is the crowd's point, so all but one of its codes stay empty.
    rare = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    book = EmaCodebook(4, 2)
    book.observe(torch.cat([torch.zeros(200, 2), rare]))
    found = {tuple(row) for row in book.weight.tolist()}
    assert found == {(0.0, 0.0), *map(tuple, rare.tolist())}


def test_a_revived_code_starts_with_an_even_share() -> None:
    book = plain(2, 1, decay=0.5, dead_below=0.3)
    book._set(torch.tensor([[0.0], [99.0]]), torch.tensor([10.0, 0.1]))
    VectorQuantizer(book).train()(torch.linspace(-1, 1, 10)[:, None], seed=0)
    torch.testing.assert_close(book.ema_counts, torch.tensor([10.0, 5.0]))
    torch.testing.assert_close(book.ema_sums[1], 5.0 * book.weight[1])
    assert book.weight[1].abs() <= 1


def test_no_rows_waits_for_the_next_batch() -> None:
    book = EmaCodebook(4, 3)
    out = VectorQuantizer(book).train()(torch.zeros(0, 3), seed=0)
    assert out.codes.shape == (0,)
    assert not bool(book.initialised)
    assert book.weight.isfinite().all()


def test_non_finite_rows_do_not_poison_the_codes() -> None:
    book = EmaCodebook(4, 3)
    quantizer = VectorQuantizer(book).train()
    rows = torch.randn(50, 3)
    rows[7] = torch.nan
    rows[9, 1] = torch.inf
    out = quantizer(rows, seed=0)
    assert out.codes[7] == out.codes[9] == -1
    assert book.weight.isfinite().all()
    assert book.ema_sums.isfinite().all()


def test_dead_code_takes_the_place_of_a_row() -> None:
    book = plain(2, 2, decay=0.5, dead_below=0.3)
    book._set(torch.tensor([[0.0, 0.0], [99.0, 99.0]]), torch.tensor([8.0, 8.0]))
    quantizer = VectorQuantizer(book).train()
    rows = clusters(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), 8)
    for _ in range(3):
        quantizer(rows, seed=0)
    assert (torch.cdist(book.weight, rows).min(1).values < 2.0).all()
    for _ in range(20):
        out = quantizer(rows, seed=0)
    assert out.perplexity > 1.9


def test_cosine_codes_are_unit_and_ignore_length() -> None:
    book = EmaCodebook(3, 3, metric="cosine", decay=0.5, dead_below=0.0)
    quantizer = VectorQuantizer(book).train()
    rows = clusters(torch.eye(3), 30)
    lengths = 10 ** torch.linspace(-2, 2, rows.shape[0])[:, None]
    for _ in range(30):
        out = quantizer(rows * lengths, seed=0)
    torch.testing.assert_close(book.weight.norm(dim=1), torch.ones(3))
    assert torch.equal(out.codes, quantizer.codes(rows))
    assert out.perplexity > 2.9


def test_gradient_codebook_is_a_parameter_and_ema_is_not() -> None:
    assert [name for name, _ in Codebook(4, 2).named_parameters()] == ["weight"]
    assert not list(EmaCodebook(4, 2).parameters())
    assert set(EmaCodebook(4, 2).state_dict()) == {
        "weight", "ema_counts", "ema_sums", "initialised", "steps",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_codes": 0}, "must be >= 1, got 0"),
        ({"metric": "dot"}, "metric must be one of"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmaCodebook(**{"num_codes": 4, "dim": 2, **settings})  # type: ignore[arg-type]


RANK_SCRIPT = """
import sys, torch, torch.distributed as dist
from latent_rl.nn import EmaCodebook, VectorQuantizer
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                        world_size=world)
rows = torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(5))
# Uneven shares, and a rank without any row in the last step.
bounds = [(0, 10, 40), (0, 30, 40), (0, 40, 40)]
torch.manual_seed(rank)
quantizer = VectorQuantizer(EmaCodebook(8, 4, decay=0.8, dead_below=0.5)).train()
for step, edges in zip(rows, bounds):
    quantizer(step[edges[rank]:edges[rank + 1]], seed=0)
torch.save(quantizer.codebook.state_dict(), f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_hold_the_codebook_of_the_joined_batch(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, str(rank), "2", str(tmp_path)], env=environment
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    alone = VectorQuantizer(EmaCodebook(8, 4, decay=0.8, dead_below=0.5)).train()
    for step in torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(5)):
        alone(step, seed=0)
    for name, value in alone.codebook.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        # Only the order of float32 sums differs.
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
