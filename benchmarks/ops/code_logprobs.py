"""code_logprobs: log-probability, entropy and exact KL over the codes, forward and backward."""

from __future__ import annotations

import torch

from benchmarks.registry import Call, Entry, Inputs, Peer, Shape
from latent_rl import ops


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    n, size = shape["N"], shape["K"]
    return {
        "logits": torch.randn(n, size, generator=generator).to(device, dtype),
        "ref_logits": torch.randn(n, size, generator=generator).to(device, dtype),
        "codes": torch.randint(size, (n,), generator=generator).to(device),
    }


def ours(inputs: Inputs) -> Call:
    logits = inputs["logits"].clone().requires_grad_()

    def call() -> None:
        out = ops.code_logprobs(logits, inputs["codes"], inputs["ref_logits"])
        torch.autograd.grad((out.logprob + out.entropy + out.kl).sum(), logits)

    return call


def eager(inputs: Inputs) -> Call:
    logits = inputs["logits"].clone().requires_grad_()

    def call() -> None:
        log_probs = logits.float().log_softmax(-1)
        reference = inputs["ref_logits"].float().log_softmax(-1)
        chosen = log_probs.gather(-1, inputs["codes"][:, None])[:, 0]
        probs = log_probs.exp()
        entropy = -(probs * log_probs).sum(-1)
        divergence = (probs * (log_probs - reference)).sum(-1)
        torch.autograd.grad((chosen + entropy + divergence).sum(), logits)

    return call


ENTRY = Entry(
    op="code_logprobs",
    shapes=(
        Shape({"N": 65536, "K": 128}, "64 rollouts of 1024 codes"),
        Shape({"N": 8192, "K": 8192}, "large codebook"),
    ),
    make_inputs=make_inputs,
    ours=ours,
    peers=(Peer("eager", eager),),
    # Forward and backward each read both logits; backward writes one gradient.
    bytes_moved=lambda s, dtype: 5 * s["N"] * s["K"] * dtype.itemsize,
    flops=lambda s: 20 * s["N"] * s["K"],
    tests="tests/ops/test_code_logprobs.py",
)
