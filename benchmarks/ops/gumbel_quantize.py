"""gumbel_quantize: the paper's straight-through quantizer, forward and backward."""

from __future__ import annotations

import torch

from benchmarks.registry import Call, Entry, Inputs, Peer, Shape
from latent_rl import ops


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape["N"], shape["K"], generator=generator)
    codebook = torch.randn(shape["K"], shape["D"], generator=generator)
    return {"logits": logits.to(device, dtype), "codebook": codebook.to(device, dtype)}


def ours(inputs: Inputs) -> Call:
    logits = inputs["logits"].clone().requires_grad_()
    codebook = inputs["codebook"].clone().requires_grad_()

    def call() -> None:
        out = ops.gumbel_quantize(logits, codebook, tau=2.0, seed=0)
        torch.autograd.grad(out.vectors.sum() + out.entropy.sum(), (logits, codebook))

    return call


def functional(inputs: Inputs) -> Call:
    """``F.gumbel_softmax`` and a one-hot product, as in the paper's code."""
    logits = inputs["logits"].clone().requires_grad_()
    codebook = inputs["codebook"].clone().requires_grad_()

    def call() -> None:
        one_hot = torch.nn.functional.gumbel_softmax(logits, tau=2.0, hard=True)
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        torch.autograd.grad((one_hot @ codebook).sum() + entropy.sum(), (logits, codebook))

    return call


ENTRY = Entry(
    op="gumbel_quantize",
    shapes=(
        Shape({"N": 8192, "K": 128, "D": 2048}, "the paper's codebook"),
        Shape({"N": 4096, "K": 8192, "D": 256}, "large codebook"),
    ),
    make_inputs=make_inputs,
    ours=ours,
    peers=(Peer("F.gumbel_softmax + matmul", functional),),
    # Forward reads the logits; backward reads them again and writes their gradient.
    bytes_moved=lambda s, dtype: 3 * s["N"] * s["K"] * dtype.itemsize,
    flops=lambda s: 2 * s["N"] * s["K"] * s["D"],
    tests="tests/ops/test_gumbel_quantize.py",
)
