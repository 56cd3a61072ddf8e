"""k-means: seeds lie far apart, Lloyd's steps lower the error, everything repeats."""

import itertools

import pytest
import torch
from torch import Tensor

from latent_rl.nn import EmaCodebook
from latent_rl.nn import kmeans as module
from latent_rl.nn.kmeans import lloyd_step, seed_centers


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(count: int, each: int, dim: int = 8) -> Tensor:
    """Tight clusters, far apart: [count * each, dim]."""
    centers = 100 * torch.randn(count, dim, generator=generator(1))
    return (centers[:, None] + torch.randn(count, each, dim, generator=generator(2))).flatten(0, 1)


def error(rows: Tensor, centers: Tensor) -> float:
    return float(torch.cdist(rows, centers).square().amin(1).mean())


@pytest.mark.parametrize("seed", range(5))
def test_seeds_hit_every_far_cluster(seed) -> None:
    rows = clusters(20, 30)
    centers = seed_centers(rows, 20, "l2", generator(seed))
    # A cluster without a seed would cost thousands; rows drawn evenly miss a third of them.
    assert error(rows, centers) < 30
    evenly = rows[torch.randperm(600, generator=generator(seed))[:20]]
    assert error(rows, evenly) > 300


def test_many_seeds_per_round_still_spread(monkeypatch) -> None:
    rows = clusters(20, 30)
    monkeypatch.setattr(module, "SEEDING_ROUNDS", 8)
    centers = seed_centers(rows, 40, "l2", generator())
    assert centers.unique(dim=0).shape[0] == 40
    assert error(rows, centers) < 30


def test_seeds_are_rows_and_repeat() -> None:
    rows = torch.randn(50, 3, generator=generator())
    centers = seed_centers(rows, 12, "l2", generator(3))
    assert torch.equal(centers, seed_centers(rows, 12, "l2", generator(3)))
    assert not torch.equal(centers, seed_centers(rows, 12, "l2", generator(4)))
    assert all((rows == center).all(1).any() for center in centers)
    assert centers.unique(dim=0).shape[0] == 12


def test_few_distinct_rows_fill_up_with_copies() -> None:
    rows = torch.tensor([[0.0, 0], [0, 0], [5, 5], [5, 5], [5, 5]])
    centers = seed_centers(rows, 4, "l2", generator())
    assert centers.shape == (4, 2)
    assert centers.unique(dim=0).shape[0] == 2


def test_every_row_may_become_a_center() -> None:
    rows = torch.randn(6, 2, generator=generator())
    centers = seed_centers(rows, 6, "l2", generator())
    assert torch.equal(centers.sort(0).values, rows.sort(0).values)


def test_more_seeds_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_centers must be <= 3 \(rows\), got 4"):
        seed_centers(torch.zeros(3, 2), 4, "l2", generator())


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_lloyd_never_raises_the_error(metric) -> None:
    rows = torch.randn(300, 5, generator=generator())
    if metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=-1)
    centers = seed_centers(rows, 9, metric, generator())
    errors = [error(rows, centers)]
    for _ in range(6):
        centers, counts = lloyd_step(rows, centers, metric)
        assert counts.sum() == 300
        errors.append(error(rows, centers))
    # Rounding of float32 means aside.
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_a_codebook_starts_at_the_clusters() -> None:
    rows = clusters(16, 20)
    book = EmaCodebook(16, 8)
    book.initialise(rows)
    # The mean squared distance inside a cluster is its dimension.
    assert error(rows, book.weight) < 9
