"""k-means over rows: seeding far apart, and Lloyd's steps; never rows by codes at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latent_rl import ops

__all__ = ["SEEDING_ROUNDS", "lloyd_step", "seed_centers"]

# Up to this many centers are drawn one at a time, as k-means++ does; more are drawn in as many
# rounds of several, as k-means|| does, since every round passes over all rows.
SEEDING_ROUNDS = 128


def seed_centers(rows: Tensor, num_centers: int, metric: str, draw: torch.Generator) -> Tensor:
    """Draw distinct rows, each with probability proportional to its squared distance.

    k-means++ (Arthur and Vassilvitskii 2007): the first row evenly, every further one by its
    squared distance to the nearest drawn so far. Beyond :data:`SEEDING_ROUNDS` centers several are
    drawn per round without looking at each other (Bahmani et al. 2012).

    Args:
        rows: float32 [N, D], finite; of length one for the cosine metric.
        num_centers: K <= N.
        metric: "l2" or "cosine".
        draw: a generator on the CPU; the same draws on every device.

    Returns:
        [K, D]. Where fewer than K rows differ, the rest are evenly drawn rows not taken yet.

    Raises:
        ValueError: for K above N.
    """
    n = rows.shape[0]
    if num_centers > n:
        raise ValueError(f"seed_centers: num_centers must be <= {n} (rows), got {num_centers}")
    per_round = -(-num_centers // SEEDING_ROUNDS)
    taken = torch.zeros(n, dtype=torch.bool)
    picked = torch.randint(n, (1,), generator=draw)
    nearest = torch.full((n,), torch.inf, dtype=torch.float64)
    order = [picked]
    while True:
        taken[picked] = True
        found = sum(len(part) for part in order)
        if found == num_centers:
            return rows[torch.cat(order).to(rows.device)]
        _, distance = ops.nearest_code(
            rows, rows[picked.to(rows.device)], metric=metric, return_distance=True
        )
        nearest = torch.minimum(nearest, distance.double().cpu().clamp_min(0))
        weights = nearest.masked_fill(taken, 0.0)
        wanted = min(per_round, num_centers - found)
        apart = int((weights > 0).sum())
        if apart < wanted:
            # What is left lies on centers already: any of it.
            weights, wanted = (~taken).double(), min(wanted, int((~taken).sum()))
        picked = _draw(weights, wanted, draw)
        order.append(picked)


def _draw(weights: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """``count`` distinct ids by weight: the largest of log w + Gumbel noise (any number of ids)."""
    noise = torch.rand(weights.shape, generator=draw, dtype=torch.float64)
    scores = weights.log() - (-noise.log()).log()
    return scores.topk(count).indices


def lloyd_step(rows: Tensor, centers: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """One step: every center moves to the mean of the rows it serves.

    An empty center takes the row served worst so far.

    Args:
        rows: [N, D] with N >= K.
        centers: [K, D].
        metric: "l2" or "cosine" (the means are scaled to length one).

    Returns:
        Centers [K, D] and the rows each served before the step, [K] in the rows' dtype.
    """
    out = ops.quantize(rows, centers, metric=metric)
    counts = out.counts.to(rows.dtype)
    means = out.sums.to(rows.dtype) / counts.clamp_min(1.0)[:, None]
    empty = counts == 0
    if bool(empty.any()):
        distance = (rows - centers[out.codes]).square().sum(-1)
        worst = distance.argsort(descending=True, stable=True)[: int(empty.sum())]
        means[empty] = rows[worst]
    if metric == "cosine":
        means = nn.functional.normalize(means, dim=-1)
    return means, counts
