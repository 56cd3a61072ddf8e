"""code_logprobs: log-probability, entropy and exact KL over the codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.registry import Entry, Inputs, Pass, Peer, Shape
from benchmarks.steps import compiled, differentiated
from latent_rl import ops

WANTED = ("logits",)


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    n, size = shape["N"], shape["K"]
    return {
        "logits": torch.randn(n, size, generator=generator, device=device).to(device, dtype),
        "ref_logits": torch.randn(n, size, generator=generator, device=device).to(device, dtype),
        "codes": torch.randint(size, (n,), generator=generator, device=device),
    }


def code_logprobs(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(ops.code_logprobs(t["logits"], t["codes"], t["ref_logits"]))


def composed(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    log_probs = t["logits"].float().log_softmax(-1)
    reference = t["ref_logits"].float().log_softmax(-1)
    chosen = log_probs.gather(-1, t["codes"][:, None])[:, 0]
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1)
    divergence = (probs * (log_probs - reference)).sum(-1)
    return chosen, entropy, divergence


ENTRY = Entry(
    op="code_logprobs",
    passes=(Pass.FORWARD, Pass.TRAIN),
    shapes=(
        Shape({"N": 65536, "K": 128}, "64 rollouts of 1024 codes"),
        Shape({"N": 2048, "K": 8192}, "large codebook", {"cpu": ("float32",)}),
        Shape({"N": 65536, "K": 8192}, "large codebook, many rows", {"cuda": ("bfloat16",)}),
    ),
    make_inputs=make_inputs,
    ours=differentiated(code_logprobs, WANTED),
    peers=(
        Peer("eager", differentiated(composed, WANTED)),
        Peer("torch.compile", compiled(composed, WANTED)),
    ),
    # Forward and backward each read both logits; backward writes one gradient.
    bytes_moved=lambda s, dtype, which: (
        (2 if which is Pass.FORWARD else 5) * s["N"] * s["K"] * dtype.itemsize
    ),
    flops=lambda s, which: (8 if which is Pass.FORWARD else 20) * s["N"] * s["K"],
    tests="tests/ops/test_code_logprobs.py",
)
