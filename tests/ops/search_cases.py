"""Searches that are easy to get wrong, shared by every backend's tests of nearest_code."""

import torch
from torch import Tensor

METRICS = ("l2", "cosine", "dot")
# Cosines are scale-free: only a zero vector is too short to have one, and it counts as 0.
SMALLEST = torch.finfo(torch.float64).tiny
# Products of such numbers leave float32 through its denormals: a float32 score decides nothing.
TINY_SCALES = (1e-15, 1e-20, 1e-22, 1e-30)
# (G, N, K, D): single codes, sizes around and off every block size, wide and narrow.
SIZES = ((1, 1, 1, 1), (2, 5, 1, 3), (1, 70, 130, 65), (1, 33, 64, 64), (2, 9, 17, 200))


def random_search(size: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normal rows and codes."""
    groups, n, num_codes, width = size
    generator = torch.Generator().manual_seed(sum(size))
    x = torch.randn(groups, n, width, generator=generator)
    codebook = torch.randn(groups, num_codes, width, generator=generator)
    return x.to(dtype), codebook.to(dtype)


def tiny_search(scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [60, D] and codes [40, D] of a given small magnitude."""
    generator = torch.Generator().manual_seed(1)
    x, codebook = (scale * torch.randn(n, 24, generator=generator) for n in (60, 40))
    return x.to(dtype), codebook.to(dtype)


def hostile_searches(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Ties, near-ties, overflow and numbers that are not finite; each [1, N, D] and [1, K, D]."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cases = {}
    codebook = normal(1, 40, 24)
    codebook[:, 31] = codebook[:, 3]
    cases["duplicate codes"] = (codebook[:, [31, 3, 7]], codebook)

    x, codebook = normal(1, 20, 24), normal(1, 40, 24)
    x[0, 2, 5], x[0, 3, 0], x[0, 4, 23] = torch.nan, torch.inf, -torch.inf
    codebook[0, 0, 1], codebook[0, 39, 2] = torch.nan, torch.inf
    cases["not finite"] = (x, codebook)
    cases["no usable code"] = (normal(1, 4, 8), torch.full((1, 3, 8), torch.nan))

    base = normal(1, 1, 256)
    near = base + 1e-4 * normal(1, 60, 256)
    cases["near duplicates"] = (base + 1e-4 * normal(1, 50, 256), near)
    cases["far from the origin"] = (normal(1, 50, 96) + 8, normal(1, 60, 96) + 8)
    cases["zero rows and codes"] = (
        torch.zeros(1, 3, 8),
        torch.cat([normal(1, 2, 8), torch.zeros(1, 2, 8)], 1),
    )
    # float16 squares overflow at 256; sums of 2048 of them far earlier.
    cases["large norms"] = (100 * normal(1, 10, 2048), 100 * normal(1, 9, 2048))
    integers = torch.randint(-2, 3, (1, 200, 4), generator=generator).float()
    cases["exact ties"] = (integers[:, :120], integers[:, 120:])
    return {name: (x.to(dtype), c.to(dtype)) for name, (x, c) in cases.items()}


def oracle(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Codes [G, N] by float64 loops over codes, written apart from every implementation."""
    out = torch.full(x.shape[:2], -1, dtype=torch.int64)
    for g in range(x.shape[0]):
        for n in range(x.shape[1]):
            row, best = x[g, n].double(), torch.inf
            if not row.isfinite().all():
                continue
            for k in range(codebook.shape[1]):
                code = codebook[g, k].double()
                if not code.isfinite().all():
                    continue
                if metric == "l2":
                    value = (row - code).square().sum()
                elif metric == "dot":
                    value = -(row @ code)
                else:
                    value = -(row @ code) / code.norm().clamp(min=SMALLEST)
                if value < best:
                    best, out[g, n] = value, k
    return out


def excess(x: Tensor, codebook: Tensor, codes: Tensor, metric: str) -> Tensor:
    """How much farther the chosen codes are than the nearest, in float64; [rows with a code]."""
    wide, table = x.double(), codebook.double()
    if metric == "l2":
        distance = (wide[:, :, None] - table[:, None]).square().sum(-1)
    else:
        length = table.norm(dim=-1).clamp(min=SMALLEST) if metric == "cosine" else torch.ones(1)
        distance = -(wide @ table.transpose(1, 2)) / length[:, None]
    distance = distance.masked_fill(~codebook.isfinite().all(-1)[:, None], torch.inf)
    chosen = distance.gather(-1, codes.clamp(min=0)[..., None])[..., 0]
    return (chosen - distance.amin(-1))[codes >= 0]
