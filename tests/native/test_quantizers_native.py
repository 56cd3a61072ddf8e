"""quantize and gumbel_quantize in C++: the same bits on every instruction set and thread count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latent_rl import _C, ops
from latent_rl.native.gumbel_quantize import gumbel_quantize_backward, gumbel_quantize_forward
from latent_rl.native.quantize import quantize_backward, quantize_forward

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantized(dtype: torch.dtype) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    x, codebook = (torch.randn(n, 530, generator=draw).to(dtype) for n in (300, 9))
    x[7, 3] = torch.nan
    forward = quantize_forward(x, codebook, "l2")
    codes, _, _, counts, sums, _ = forward
    losses = torch.tensor(0.3), torch.tensor(0.4)
    return *forward, *quantize_backward(x, *losses, x, codebook, codes, counts, sums)


def drawn(dtype: torch.dtype, hard: bool) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(700, 77, generator=draw)).to(dtype)
    codebook = torch.randn(77, 5, generator=draw).to(dtype)
    logits[3, 4], logits[5, 5] = -torch.inf, torch.nan
    seeds = ops.row_seeds(3, 700)
    forward = gumbel_quantize_forward(logits, codebook, 0.7, seeds, hard)
    grads = (
        torch.ones(700, 5).to(dtype),
        torch.ones(700, dtype=wide(dtype)),
        torch.linspace(-1, 1, 77, dtype=wide(dtype)),
    )
    relaxed = (logits, codebook, 0.7, seeds, hard, forward[0])
    return *forward, *gumbel_quantize_backward(*grads, *relaxed)


OUTCOMES = {
    "quantize": quantized,
    "gumbel_quantize hard": lambda dtype: drawn(dtype, True),
    "gumbel_quantize soft": lambda dtype: drawn(dtype, False),
}


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a[~a.isnan()], b[~b.isnan()])
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OUTCOMES)
def test_the_instruction_sets_agree(every_isa: list[str], op: str, dtype: torch.dtype) -> None:
    best = OUTCOMES[op](dtype)
    for name in every_isa:
        _C.select_isa(name)
        assert same(OUTCOMES[op](dtype), best)


@pytest.mark.parametrize("dtype", DTYPES)
# The soft form's product is torch's, which promises nothing across thread counts.
@pytest.mark.parametrize("op", ["quantize", "gumbel_quantize hard"])
def test_threads_change_nothing(op: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    alone = OUTCOMES[op](dtype)
    torch.set_num_threads(3)
    for _ in range(3):
        assert same(OUTCOMES[op](dtype), alone)
