"""sample_codes: truncated sampling of one code per row, with its log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Call, Entry, Goal, Inputs, Pass, Peer, Shape
from benchmarks.steps import forward_only
from latent_rl import ops

TOP_K, TOP_P, TEMPERATURE = 32, 0.95, 0.8
COMPOSED = "topk + softmax + multinomial"
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16")}


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape["B"], shape["K"], generator=generator, device=device)
    return {
        "logits": logits.to(device, dtype),
        "seeds": ops.row_seeds(0, shape["B"], device),
        "offsets": torch.zeros(shape["B"], dtype=torch.int64, device=device),
    }


def sample(inputs: Inputs) -> object:
    return ops.sample_codes(
        inputs["logits"],
        temperature=TEMPERATURE,
        top_k=TOP_K,
        top_p=TOP_P,
        seed=inputs["seeds"],
        offset=inputs["offsets"],
    )


def composed(inputs: Inputs) -> tuple[Tensor, ...]:
    """top-k, top-p, softmax and multinomial from PyTorch, and the same three statistics."""
    logits = inputs["logits"].float()
    full = logits.log_softmax(-1)
    values, order = (logits / TEMPERATURE).topk(min(TOP_K, logits.shape[-1]), -1)
    probs = values.softmax(-1)
    outside = probs.cumsum(-1) - probs >= TOP_P
    kept = values.masked_fill(outside, -torch.inf).log_softmax(-1)
    choice = torch.multinomial(kept.exp(), 1)
    codes = order.gather(-1, choice)
    entropy = torch.special.entr(kept.exp()).sum(-1)
    return codes, kept.gather(-1, choice), full.gather(-1, codes), entropy


def composed_compiled(inputs: Inputs, which: Pass) -> Call:
    compiled = torch.compile(composed, dynamic=False)
    return lambda: compiled(inputs)


def flashinfer(inputs: Inputs, which: Pass) -> Call:
    """Codes alone: no log-probabilities, and a draw depends on the row's place in the batch."""
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    logits = inputs["logits"].float()
    # Seeds in tensors are what a captured graph needs.
    stream = {"seed": inputs["seeds"], "offset": inputs["offsets"]}
    return lambda: top_k_top_p_sampling_from_logits(
        logits / TEMPERATURE,
        TOP_K,
        TOP_P,
        filter_apply_order="top_k_first",
        deterministic=True,
        **stream,
    )


def shape_of(rows: int, size: int) -> Shape:
    note = "the paper's codebook" if size == 128 else "large codebook"
    goals = {}
    if (rows, size) == (64, 128):
        goals = {("cpu", "float32", Pass.FORWARD): (Goal(5, COMPOSED),)}
    return Shape({"B": rows, "K": size}, note, DTYPES, goals)


ENTRY = Entry(
    op="sample_codes",
    passes=(Pass.FORWARD,),
    shapes=tuple(shape_of(rows, size) for size in (128, 8192) for rows in (1, 64, 256)),
    make_inputs=make_inputs,
    ours=forward_only(sample),
    peers=(
        Peer(COMPOSED, forward_only(composed)),
        Peer("torch.compile", composed_compiled, dtypes=("float32",)),
        Peer("FlashInfer", flashinfer, "flashinfer", ("cuda",), note="codes alone"),
    ),
    bytes_moved=lambda s, dtype, which: s["B"] * s["K"] * dtype.itemsize + 36 * s["B"],
    flops=lambda s, which: 10 * s["B"] * s["K"],
    tests="tests/ops/test_sample_codes.py",
)
