"""sample_tokens: one token per row from a vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Call, Entry, Inputs, Pass, Peer, Shape
from benchmarks.steps import forward_only
from latent_rl import ops

DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    logits = 2 * torch.randn(shape["B"], shape["V"], generator=generator, device=device)
    return {
        "logits": logits.to(device, dtype),
        "seeds": ops.row_seeds(0, shape["B"], device),
        "offsets": torch.zeros(shape["B"], dtype=torch.int64, device=device),
    }


def sample(inputs: Inputs) -> Tensor:
    return ops.sample_tokens(inputs["logits"], seed=inputs["seeds"], offset=inputs["offsets"])


def multinomial(inputs: Inputs) -> Tensor:
    return torch.multinomial(inputs["logits"].float().softmax(-1), 1)[:, 0]


def exponential_race(inputs: Inputs) -> Tensor:
    """The form of gpt-fast: no host synchronisation, no cumulative sum."""
    probs = inputs["logits"].float().softmax(-1)
    return (probs / torch.empty_like(probs).exponential_(1)).argmax(-1)


def race_compiled(inputs: Inputs, which: Pass) -> Call:
    compiled = torch.compile(exponential_race, dynamic=False)
    return lambda: compiled(inputs)


def flashinfer(inputs: Inputs, which: Pass) -> Call:
    from flashinfer.sampling import sampling_from_logits

    logits, stream = inputs["logits"], {"seed": inputs["seeds"], "offset": inputs["offsets"]}
    return lambda: sampling_from_logits(logits, deterministic=True, **stream)


ENTRY = Entry(
    op="sample_tokens",
    passes=(Pass.FORWARD,),
    shapes=(
        Shape({"B": 8, "V": 32_000}, "a small vocabulary", {"cpu": ("float32",)}),
        *(
            Shape({"B": rows, "V": 151_936}, "Qwen2.5's vocabulary", {"cuda": ("bfloat16",)})
            for rows in (1, 64, 256)
        ),
    ),
    make_inputs=make_inputs,
    ours=forward_only(sample),
    peers=(
        Peer("softmax + multinomial", forward_only(multinomial)),
        Peer("softmax + exponential race", forward_only(exponential_race)),
        Peer("torch.compile", race_compiled, note="of the exponential race"),
        Peer("FlashInfer", flashinfer, "flashinfer", ("cuda",), note="makes a float32 copy"),
    ),
    bytes_moved=lambda s, dtype, which: s["B"] * s["V"] * dtype.itemsize + 24 * s["B"],
    flops=lambda s, which: 10 * s["B"] * s["V"],
    tests="tests/ops/test_sample_tokens.py",
)
