"""sample_codes: truncated sampling of one code per row, with its log-probabilities."""

from __future__ import annotations

import torch

from benchmarks.registry import Call, Entry, Inputs, Peer, Shape
from latent_rl import ops

TOP_K, TOP_P, TEMPERATURE = 32, 0.95, 0.8


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape["B"], shape["K"], generator=generator)
    seeds = ops.row_seeds(0, shape["B"], device)
    return {"logits": logits.to(device, dtype), "seeds": seeds}


def ours(inputs: Inputs) -> Call:
    return lambda: ops.sample_codes(
        inputs["logits"],
        temperature=TEMPERATURE,
        top_k=TOP_K,
        top_p=TOP_P,
        seed=inputs["seeds"],
    )


def composed(inputs: Inputs) -> Call:
    """top-k, top-p, softmax and multinomial from PyTorch, and the same three statistics."""
    logits = inputs["logits"]

    def call() -> None:
        full = logits.log_softmax(-1)
        values, order = (logits / TEMPERATURE).topk(min(TOP_K, logits.shape[-1]), -1)
        probs = values.softmax(-1)
        outside = probs.cumsum(-1) - probs >= TOP_P
        kept = values.masked_fill(outside, -torch.inf).log_softmax(-1)
        choice = torch.multinomial(kept.exp(), 1)
        codes = order.gather(-1, choice)
        kept.gather(-1, choice)
        full.gather(-1, codes)
        torch.special.entr(kept.exp()).sum(-1)

    return call


ENTRY = Entry(
    op="sample_codes",
    shapes=(
        Shape({"B": 64, "K": 128}, "a decoding step of the paper's model"),
        Shape({"B": 256, "K": 8192}, "large codebook"),
    ),
    make_inputs=make_inputs,
    ours=ours,
    peers=(Peer("topk + softmax + multinomial", composed),),
    bytes_moved=lambda s, dtype: s["B"] * s["K"] * dtype.itemsize + 20 * s["B"],
    flops=lambda s: 10 * s["B"] * s["K"],
    tests="tests/ops/test_sample_codes.py",
)
