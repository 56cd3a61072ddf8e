"""gumbel_quantize: the paper's straight-through quantizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.registry import Entry, Goal, Inputs, Pass, Peer, Shape
from benchmarks.steps import compiled, differentiated
from latent_rl import ops

WANTED = ("logits", "codebook")
TAU = 2.0
FUNCTIONAL = "F.gumbel_softmax + matmul"


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape["N"], shape["K"], generator=generator, device=device)
    codebook = torch.randn(shape["K"], shape["D"], generator=generator, device=device)
    return {
        "logits": logits.to(device, dtype),
        "codebook": codebook.to(device, dtype),
        "seeds": ops.row_seeds(0, shape["N"], device),
    }


def gumbel_quantize(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    out = ops.gumbel_quantize(t["logits"], t["codebook"], tau=TAU, seed=t["seeds"])
    return out.vectors, out.entropy


def functional(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """``F.gumbel_softmax`` and a one-hot product, as in the paper's code."""
    logits = t["logits"]
    one_hot = torch.nn.functional.gumbel_softmax(logits, tau=TAU, hard=True)
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return one_hot @ t["codebook"], entropy.float()


def multiply_adds(shape: Shape, which: Pass) -> int:
    """Hard codes gather; the backward meets every code with every row's gradient."""
    elementwise = 10 * shape["N"] * shape["K"]
    product = 2 * shape["N"] * shape["K"] * shape["D"]
    return elementwise if which is Pass.FORWARD else 2 * elementwise + product


def traffic(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """Forward reads logits and codebook and writes vectors; backward mirrors it."""
    logits, codebook, vectors = (
        shape[a] * shape[b] * dtype.itemsize for a, b in (("N", "K"), ("K", "D"), ("N", "D"))
    )
    forward = logits + codebook + vectors
    return forward if which is Pass.FORWARD else 3 * logits + 3 * codebook + 2 * vectors


CUDA_GOALS = {("cuda", "bfloat16", which): (Goal(6, FUNCTIONAL),) for which in Pass}

ENTRY = Entry(
    op="gumbel_quantize",
    passes=(Pass.FORWARD, Pass.TRAIN),
    shapes=(
        Shape({"N": 8192, "K": 128, "D": 2048}, "the paper's codebook"),
        Shape({"N": 2048, "K": 8192, "D": 256}, "large codebook", {"cpu": ("float32",)}),
        Shape(
            {"N": 65536, "K": 8192, "D": 256},
            "large codebook, many rows",
            {"cuda": ("bfloat16",)},
            CUDA_GOALS,
        ),
    ),
    make_inputs=make_inputs,
    ours=differentiated(gumbel_quantize, WANTED),
    peers=(
        Peer(FUNCTIONAL, differentiated(functional, WANTED)),
        Peer("torch.compile", compiled(functional, WANTED)),
    ),
    bytes_moved=traffic,
    flops=multiply_adds,
    tests="tests/ops/test_gumbel_quantize.py",
)
