"""quantize: one vector-quantization step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.ops.nearest_code import chunked_gemm, make_inputs
from benchmarks.registry import Call, Entry, Goal, Inputs, Pass, Peer, Shape
from benchmarks.steps import compiled, differentiated
from latent_rl import ops

WANTED = ("x", "codebook")
VQ_PYTORCH = "vector-quantize-pytorch"


def quantize(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    out = ops.quantize(t["x"], t["codebook"])
    return out.quantized, out.commitment_loss, out.codebook_loss


def composed(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The usual composition: distances, argmin, one-hot statistics, two losses."""
    x, codebook = t["x"], t["codebook"]
    distance = torch.addmm(codebook.square().sum(1), x.detach(), codebook.detach().T, alpha=-2)
    codes = distance.argmin(1)
    chosen = codebook[codes]
    one_hot = torch.nn.functional.one_hot(codes, len(codebook)).to(x.dtype)
    usage = one_hot.mean(0)
    perplexity = (-(usage * (usage + 1e-10).log()).sum()).exp()
    sums = one_hot.T @ x.detach()
    commitment = (x - chosen.detach()).square().mean()
    codebook_loss = (x.detach() - chosen).square().mean()
    # Statistics are results too: kept, or a compiler would drop them.
    straight_through = x + (chosen - x).detach() + 0.0 * (perplexity + sums[0, 0]).detach()
    return straight_through, commitment, codebook_loss


def vector_quantize_pytorch(inputs: Inputs, which: Pass) -> Call:
    """Its training step with a moving-average codebook, started from the same codes."""
    from vector_quantize_pytorch import VectorQuantize

    size, width = inputs["codebook"].shape
    module = VectorQuantize(dim=width, codebook_size=size).to(inputs["x"].device)
    module.codebook = inputs["codebook"].float()
    module.train()
    x = inputs["x"][None]
    if which is Pass.FORWARD:
        return lambda: module(x)
    leaf = x.clone().requires_grad_()
    grad, _, loss = module(leaf)
    grads = torch.randn_like(grad), torch.ones_like(loss)

    def call() -> tuple[Tensor, ...]:
        quantized, _, loss = module(leaf)
        return torch.autograd.grad((quantized, loss), leaf, grads)

    return call


def on_cpu(train: float) -> dict[tuple[str, str, Pass], tuple[Goal, ...]]:
    return {("cpu", "float32", Pass.TRAIN): (Goal(train, VQ_PYTORCH),)}


def on_cuda(train: float, *more: Goal) -> dict[tuple[str, str, Pass], tuple[Goal, ...]]:
    return {("cuda", "bfloat16", Pass.TRAIN): (Goal(train, VQ_PYTORCH), *more)}


BOTH = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}

ENTRY = Entry(
    op="quantize",
    passes=(Pass.FORWARD, Pass.TRAIN),
    shapes=(
        Shape(
            {"N": 8192, "D": 2048, "K": 128},
            "hidden state of a 3B model, the paper's codebook",
            BOTH,
            {
                **on_cpu(10),
                # 24 us forward and 32 us backward.
                **on_cuda(15, Goal(at_most_us=24 + 32)),
                ("cuda", "bfloat16", Pass.FORWARD): (Goal(at_most_us=24),),
            },
        ),
        Shape(
            {"N": 65536, "D": 64, "K": 1024},
            "image tokenizer",
            None,
            {**on_cpu(10), **on_cuda(30)},
        ),
        Shape(
            {"N": 8192, "D": 256, "K": 8192},
            "large codebook",
            {"cpu": ("float32",)},
            on_cpu(4),
        ),
        Shape(
            {"N": 1_000_000, "D": 256, "K": 8192},
            "a million rows, large codebook",
            {"cuda": ("bfloat16",)},
        ),
    ),
    make_inputs=make_inputs,
    ours=differentiated(quantize, WANTED),
    unit=chunked_gemm,
    peers=(
        Peer("eager", differentiated(composed, WANTED)),
        Peer("torch.compile", compiled(composed, WANTED)),
        Peer(VQ_PYTORCH, vector_quantize_pytorch, VQ_PYTORCH, note="moving-average codebook"),
    ),
    # Forward reads x and writes the output; backward reads the gradient and x and writes dx.
    bytes_moved=lambda s, dtype, which: (
        (2 if which is Pass.FORWARD else 5) * s["N"] * s["D"] * dtype.itemsize
        + s["K"] * s["D"] * dtype.itemsize
    ),
    flops=lambda s, which: 2 * s["N"] * s["K"] * s["D"],
    tests="tests/ops/test_quantize.py",
)
