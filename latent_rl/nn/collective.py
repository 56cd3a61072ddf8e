"""The few collective operations the code statistics need; no-ops on one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """True when ``torch.distributed`` runs with more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(*tensors: Tensor) -> None:
    """Sum each tensor over the ranks in place, in the order given; no-op on one process."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)


def broadcast_first(*tensors: Tensor) -> None:
    """Overwrite each tensor with rank 0's in place; no-op on one process."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_rows(rows: Tensor, limit: int) -> Tensor:
    """Up to ``limit`` rows of every rank, concatenated in rank order; ``rows`` on one process.

    Args:
        rows: [N, D]; N may differ between ranks and may be 0.
        limit: rows taken from each rank at most.

    Returns:
        [sum of min(N_rank, limit), D], equal on every rank.
    """
    rows = rows[:limit].contiguous()
    if not is_distributed():
        return rows
    count = torch.tensor([rows.shape[0]], device=rows.device, dtype=torch.int64)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    padded = rows.new_zeros(limit, rows.shape[1])
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(n)] for part, n in zip(gathered, counts, strict=True)])
