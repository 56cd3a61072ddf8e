"""gated_merge: one merge block with hard codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot, silu

from benchmarks.registry import Call, Entry, Goal, Inputs, Pass, Peer, Shape
from benchmarks.steps import compiled, differentiated
from latent_rl import ops

WANTED = ("e", "codebook", "w_gate", "w_up", "w_down")
CONCATENATED = "concatenated"


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    n, hidden, inner, size = shape["N"], shape["H"], shape["I"], shape["K"]

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, generator=generator, device=device)).to(device, dtype)

    return {
        "e": normal(n, hidden),
        "codes": torch.randint(size, (n,), generator=generator, device=device),
        "codebook": normal(size, hidden),
        "w_gate": normal(inner, 2 * hidden, scale=hidden**-0.5),
        "w_up": normal(inner, 2 * hidden, scale=hidden**-0.5),
        "w_down": normal(hidden, inner, scale=inner**-0.5),
    }


def merge(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return (
        ops.gated_merge(t["e"], t["codes"], t["codebook"], t["w_gate"], t["w_up"], t["w_down"]),
    )


def with_tables(t: Inputs, which: Pass) -> Call:
    """A decoding step: the code's share of the products was made before."""
    tables = ops.merge_tables(t["codebook"], t["w_gate"], t["w_up"])
    return lambda: (
        ops.gated_merge_step(t["e"], t["codes"], tables, t["w_gate"], t["w_up"], t["w_down"]),
    )


def block(t: Mapping[str, Tensor], code: Tensor) -> tuple[Tensor, ...]:
    joined = torch.cat([t["e"], code], -1)
    inner = silu(joined @ t["w_gate"].T) * (joined @ t["w_up"].T)
    return (inner @ t["w_down"].T,)


def concatenated(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The dense form: gather, concatenate, three wide products."""
    return block(t, t["codebook"][t["codes"]])


def paper_form(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """One-hot codes through a linear layer, then the dense form, as in the paper's code."""
    hot = one_hot(t["codes"], len(t["codebook"])).to(t["e"].dtype)
    return block(t, torch.nn.functional.linear(hot, t["codebook"].T))


def multiply_adds(shape: Shape, which: Pass) -> int:
    """Of the table form: the code half costs K rows, not N; a backward costs two forwards."""
    n, hidden, inner, size = shape["N"], shape["H"], shape["I"], shape["K"]
    forward = 2 * (3 * n * hidden * inner + 2 * size * hidden * inner)
    return forward if which is Pass.FORWARD else 3 * forward


def traffic(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """Weights, input and output; the backward reads weights again and writes their gradients."""
    rows, weights = 2 * shape["N"] * shape["H"], 5 * shape["H"] * shape["I"]
    forward = rows + weights
    saved = 4 * shape["N"] * shape["I"]
    moved = forward if which is Pass.FORWARD else 2 * rows + 3 * weights + saved
    return moved * dtype.itemsize


CUDA_GOALS = {("cuda", "bfloat16", which): (Goal(1.5, CONCATENATED),) for which in Pass}

ENTRY = Entry(
    op="gated_merge",
    passes=(Pass.FORWARD, Pass.TRAIN),
    shapes=(
        Shape(
            {"N": 1024, "H": 1024, "I": 2816, "K": 128},
            "a 0.5B model",
            {"cpu": ("float32", "bfloat16")},
        ),
        Shape({"N": 64, "H": 1024, "I": 2816, "K": 128}, "a decoding step", {"cpu": ("float32",)}),
        Shape(
            {"N": 64, "H": 2048, "I": 11008, "K": 128},
            "a decoding step of a 3B model",
            {"cuda": ("bfloat16",)},
        ),
        Shape({"N": 2048, "H": 128, "I": 256, "K": 64}, "the demo's model", {"cpu": ("float32",)}),
        Shape(
            {"N": 8192, "H": 2048, "I": 11008, "K": 128},
            "a 3B model",
            {"cuda": ("bfloat16",)},
            CUDA_GOALS,
        ),
    ),
    make_inputs=make_inputs,
    ours=differentiated(merge, WANTED),
    peers=(
        Peer(
            "tables at hand",
            with_tables,
            passes=(Pass.FORWARD,),
            note="ours: gated_merge_step, where weights do not change between calls",
        ),
        Peer(CONCATENATED, differentiated(concatenated, WANTED)),
        Peer("torch.compile", compiled(concatenated, WANTED), note="of the concatenated form"),
        Peer(
            "one-hot x Linear", differentiated(paper_form, WANTED), note="the paper's code's form"
        ),
    ),
    bytes_moved=traffic,
    flops=multiply_adds,
    tests="tests/ops/test_gated_merge.py",
)
