"""Codebooks: the K vectors an action stands for, learned by gradient or by moving averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from latent_rl import ops
from latent_rl.nn.collective import all_reduce_sum, broadcast_first, gather_rows
from latent_rl.nn.kmeans import lloyd_step, seed_centers

METRICS = ("l2", "cosine")
# Rows of one rank that k-means and dead-code revival look at, so that neither grows with the batch.
SAMPLE_ROWS = 8192


class Codebook(nn.Module):
    """K code vectors of width D; this base class learns them by gradient.

    Attributes:
        weight: [K, D]. A parameter here; a buffer in :class:`EmaCodebook`, which gradients and a
            stage's ``requires_grad_`` must not touch.
        metric: "l2" or "cosine": how :func:`latent_rl.ops.nearest_code` compares.
    """

    weight: Tensor

    def __init__(self, num_codes: int, dim: int, *, metric: str = "l2", std: float = 1.0) -> None:
        """Draw the codes from a normal distribution of standard deviation ``std``.

        Raises:
            ValueError: for K or D below 1, or an unknown metric.
        """
        super().__init__()
        if num_codes < 1 or dim < 1:
            raise ValueError(f"Codebook: num_codes and dim must be >= 1, got {num_codes} and {dim}")
        if metric not in METRICS:
            raise ValueError(f"Codebook: metric must be one of {METRICS}, got {metric!r}")
        self.metric = metric
        self._register_weight(torch.randn(num_codes, dim) * std)

    def _register_weight(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight)

    @property
    def num_codes(self) -> int:
        """K."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    def forward(self, codes: Tensor) -> Tensor:
        """Vectors of codes: int64 [...] in [0, K) -> [..., D], differentiable in the weight."""
        return nn.functional.embedding(codes, self.weight)

    def nearest(self, x: Tensor) -> Tensor:
        """Nearest code of each row: [..., D] -> int64 [...]; -1 for a non-finite row."""
        flat = x.reshape(-1, x.shape[-1])
        codes = ops.nearest_code(flat, self.weight.detach().to(x.dtype), metric=self.metric)
        return cast(Tensor, codes).reshape(x.shape[:-1])

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Look at the rows of a training step before they are quantised (k-means set-up)."""

    @torch.no_grad()
    def update(self, x: Tensor, counts: Tensor, sums: Tensor) -> None:
        """Learn from a training step's rows after they were quantised (moving averages)."""

    def extra_repr(self) -> str:
        """Sizes and metric for ``print(model)``."""
        return f"num_codes={self.num_codes}, dim={self.dim}, metric={self.metric!r}"


class EmaCodebook(Codebook):
    """Codes that follow the mean of the rows they serve (van den Oord et al. 2017, appendix A.1).

    ``n_k <- decay n_k + (1 - decay) count_k``, ``m_k <- decay m_k + (1 - decay) sum_k``,
    ``weight_k = m_k / n_k``; with the cosine metric rows and codes are projected on the unit
    sphere first. Counts and sums are summed over ranks, so every rank holds the same codebook.

    The first training batch sets the codes by k-means (:meth:`initialise`), and a code whose
    ``n_k`` falls below ``dead_below`` times an even share of the batch takes the place of a row
    of the batch, no two that of one row. Both draw from a generator seeded by ``seed`` and the
    step, so a run repeats. The averages stay float32 when the module is moved to another dtype.
    """

    ema_counts: Tensor
    ema_sums: Tensor
    initialised: Tensor
    steps: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        metric: str = "l2",
        decay: float = 0.99,
        dead_below: float = 0.1,
        kmeans_iterations: int = 10,
        std: float = 1.0,
        seed: int = 0,
    ) -> None:
        """See the class.

        Args:
            num_codes: K.
            dim: D.
            metric: "l2" or "cosine".
            decay: in [0, 1); the weight of the past.
            dead_below: share of an even count below which a code is revived; 0 turns it off.
            kmeans_iterations: Lloyd steps on the first batch; 0 keeps the random codes.
            std: of the random codes.
            seed: of the k-means and revival draws.

        Raises:
            ValueError: for a decay outside [0, 1) or a negative setting.
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EmaCodebook: decay must be in [0, 1), got {decay}")
        if dead_below < 0 or kmeans_iterations < 0:
            raise ValueError("EmaCodebook: dead_below and kmeans_iterations must be >= 0")
        super().__init__(num_codes, dim, metric=metric, std=std)
        self.decay, self.dead_below, self.seed = decay, dead_below, seed
        self.kmeans_iterations = kmeans_iterations
        self.register_buffer("ema_counts", torch.ones(num_codes))
        self.register_buffer("ema_sums", self.weight.detach().clone().float())
        self.register_buffer("initialised", torch.tensor(kmeans_iterations == 0))
        self.register_buffer("steps", torch.tensor(0))

    def _register_weight(self, weight: Tensor) -> None:
        self.register_buffer("weight", weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A step of 1 - decay is below bfloat16's resolution: averages held in it would stand still.
        averages = {"ema_counts": self.ema_counts, "ema_sums": self.ema_sums}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in averages.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _prepare(self, x: Tensor) -> Tensor:
        x = x.detach().float()
        x = x[x.isfinite().all(-1)]
        return nn.functional.normalize(x, dim=-1) if self.metric == "cosine" else x

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Run k-means on the first batch that has rows; x: [N, D]."""
        if not bool(self.initialised):
            self.initialise(x)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the codes by k-means on x [N, D]: k-means++ seeds, then Lloyd's steps.

        An empty cluster takes the row worst served so far. With fewer rows than codes the rest
        of the codes are copies of rows moved by a hundredth of the rows' spread. Every rank
        ends with the same codes. Nothing happens when no rank has a row.
        """
        rows = gather_rows(self._prepare(x), SAMPLE_ROWS)
        n, k = rows.shape[0], self.num_codes
        if n == 0:
            return
        draw = self._generator(0)
        if n < k:
            order = torch.randperm(n, generator=draw).to(rows.device)
            centers = rows[order.repeat(-(-k // n))[:k]].clone()
            noise = torch.randn(centers.shape, generator=draw).to(rows.device)
            centers[n:] += 0.01 * rows.std(unbiased=False).clamp_min(1e-6) * noise[n:]
        else:
            centers = seed_centers(rows, k, self.metric, draw)
        counts = rows.new_ones(k)
        for _ in range(self.kmeans_iterations if n > k else 0):
            centers, counts = lloyd_step(rows, centers, self.metric)
        broadcast_first(centers, counts)
        # Counts start at the mean of one step, as if this batch had been seen once.
        self._set(centers, counts.clamp_min(1.0))
        self.initialised.fill_(True)

    @torch.no_grad()
    def update(self, x: Tensor, counts: Tensor, sums: Tensor) -> None:
        """One moving-average step.

        Args:
            x: [N, D] rows of this rank (revived codes are drawn from them).
            counts: [K] rows per code on this rank.
            sums: [K, D] sum of the rows per code on this rank (of unit rows, for cosine).
        """
        counts, sums = counts.to(torch.float32).clone(), sums.to(torch.float32).clone()
        all_reduce_sum(counts, sums)
        self.ema_counts.lerp_(counts, 1.0 - self.decay)
        self.ema_sums.lerp_(sums, 1.0 - self.decay)
        self.steps.add_(1)
        # A code that was never used keeps its place: 0/0 would make it NaN.
        alive = self.ema_counts > 1e-6
        means = self.ema_sums / self.ema_counts.clamp_min(1e-6)[:, None]
        if self.metric == "cosine":
            means = nn.functional.normalize(means, dim=-1)
        self.weight.copy_(torch.where(alive[:, None], means, self.weight.float()))
        if self.dead_below > 0:
            self._revive(x, counts.sum())

    def _revive(self, x: Tensor, total: Tensor) -> None:
        even = total / self.num_codes
        dead = self.ema_counts < self.dead_below * even
        if not bool(dead.any()):
            return
        rows = gather_rows(self._prepare(x), SAMPLE_ROWS)
        if rows.shape[0] == 0:
            return
        draw = self._generator(int(self.steps))
        # Each takes a row of its own: of two codes in one place the higher id would serve nothing.
        # With more dead codes than rows the rest wait for the next batch.
        revived = dead.nonzero()[: rows.shape[0], 0]
        picks = torch.randperm(rows.shape[0], generator=draw)[: len(revived)].to(rows.device)
        centers, counts = self.weight.float().clone(), self.ema_counts.clone()
        centers[revived] = rows[picks]
        # An even share gives a revived code time to attract rows before it is judged again.
        counts[revived] = even
        broadcast_first(centers, counts)
        self._set(centers, counts)

    def _set(self, centers: Tensor, counts: Tensor) -> None:
        self.weight.copy_(centers)
        self.ema_counts.copy_(counts)
        self.ema_sums.copy_(centers * counts[:, None])

    def _generator(self, step: int) -> torch.Generator:
        # On the CPU whatever the device: the same draws everywhere.
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)
