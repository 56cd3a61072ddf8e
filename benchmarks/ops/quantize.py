"""quantize: one vector-quantization step, forward and backward."""

from __future__ import annotations

import torch

from benchmarks.ops.nearest_code import make_inputs
from benchmarks.registry import Call, Entry, Inputs, Peer, Shape
from latent_rl import ops


def ours(inputs: Inputs) -> Call:
    x = inputs["x"].clone().requires_grad_()
    codebook = inputs["codebook"].clone().requires_grad_()

    def call() -> None:
        out = ops.quantize(x, codebook)
        loss = out.quantized.sum() + out.codebook_loss + 0.25 * out.commitment_loss
        torch.autograd.grad(loss, (x, codebook))

    return call


def eager(inputs: Inputs) -> Call:
    """The usual composition: distances, argmin, one-hot counts, two losses, straight-through."""
    x = inputs["x"].clone().requires_grad_()
    codebook = inputs["codebook"].clone().requires_grad_()

    def call() -> None:
        distance = torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2)
        codes = distance.argmin(1)
        chosen = codebook[codes]
        one_hot = torch.nn.functional.one_hot(codes, len(codebook)).to(x.dtype)
        usage = one_hot.mean(0)
        (-(usage * (usage + 1e-10).log()).sum()).exp()
        one_hot.T @ x.detach()
        commitment = (x - chosen.detach()).square().mean()
        codebook_loss = (x.detach() - chosen).square().mean()
        straight_through = x + (chosen - x).detach()
        loss = straight_through.sum() + codebook_loss + 0.25 * commitment
        torch.autograd.grad(loss, (x, codebook))

    return call


def vector_quantize_pytorch(inputs: Inputs) -> Call:
    from vector_quantize_pytorch import VectorQuantize

    size, width = inputs["codebook"].shape
    module = VectorQuantize(dim=width, codebook_size=size).to(inputs["x"].device)
    module.train()
    x = inputs["x"].clone().requires_grad_()

    def call() -> None:
        quantized, _, loss = module(x[None])
        torch.autograd.grad(quantized.sum() + loss.sum(), x)

    return call


ENTRY = Entry(
    op="quantize",
    shapes=(
        Shape({"N": 8192, "D": 2048, "K": 128}, "hidden state of a 3B model, the paper's codebook"),
        Shape({"N": 65536, "D": 64, "K": 1024}, "image tokenizer"),
        Shape({"N": 8192, "D": 256, "K": 8192}, "large codebook"),
    ),
    make_inputs=make_inputs,
    ours=ours,
    peers=(Peer("eager", eager), Peer("vector-quantize-pytorch", vector_quantize_pytorch)),
    # Forward reads x and writes the output; backward reads the gradient and x and writes dx.
    bytes_moved=lambda s, dtype: 5 * s["N"] * s["D"] * dtype.itemsize,
    flops=lambda s: 2 * s["N"] * s["K"] * s["D"],
    tests="tests/ops/test_quantize.py",
)
