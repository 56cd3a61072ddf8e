"""slot_attention: a decoding step's attention over slots of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Entry, Inputs, Pass, Peer, Shape
from benchmarks.steps import forward_only
from latent_rl import ops

BOTH = {"cpu": ("float32",), "cuda": ("bfloat16",)}
GPU = {"cuda": ("bfloat16",)}


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """The middle of a rollout: G rows share half of their positions, slots are half full or more.

    Peers get the same keys as a cache of full length per row, shared positions copied.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows, length, heads, key_heads, dim = (shape[s] for s in ("B", "L", "Hq", "Hk", "D"))
    group, shared = shape["G"], length // 2
    prompts = rows // group
    stored = (prompts * shared + rows * (length - shared), key_heads, dim)
    keys, values = (torch.randn(stored, generator=generator, device=device) for _ in range(2))
    row = torch.arange(rows, device=device)
    shared_at = row // group * shared
    own_at = prompts * shared + row * (length - shared)
    ends = torch.randint(shared, length + 1, (rows,), generator=generator, device=device)
    columns = (torch.zeros_like(ends), ends, shared_at, torch.full_like(ends, shared), own_at)
    position = torch.arange(length, device=device)
    at = torch.where(
        position < shared, shared_at[:, None] + position, own_at[:, None] + position - shared
    )
    query = torch.randn(rows, heads, dim, generator=generator, device=device)
    return {
        "query": query.to(device, dtype),
        "keys": keys.to(device, dtype),
        "values": values.to(device, dtype),
        "runs": torch.stack(columns, 1),
        "row_keys": keys[at].to(device, dtype),
        "row_values": values[at].to(device, dtype),
        "mask": (position < ends[:, None])[:, None, None],
    }


def attend(t: Inputs) -> Tensor:
    return ops.slot_attention(
        t["query"], t["keys"], t["values"], t["runs"], longest=t["row_keys"].shape[1]
    )


def masked(t: Inputs) -> Tensor:
    """torch's fused attention under a mask, the queries of a key head packed as its rows."""
    rows, heads, dim = t["query"].shape
    key_heads = t["row_keys"].shape[2]
    return torch.nn.functional.scaled_dot_product_attention(
        t["query"].view(rows, key_heads, heads // key_heads, dim),
        t["row_keys"].transpose(1, 2),
        t["row_values"].transpose(1, 2),
        attn_mask=t["mask"],
    )


def repeated(t: Inputs) -> Tensor:
    """The form of transformers before 5.2x: keys repeated for every query head."""
    group = t["query"].shape[1] // t["row_keys"].shape[2]
    keys, values = (
        t[n].transpose(1, 2).repeat_interleave(group, 1) for n in ("row_keys", "row_values")
    )
    return torch.nn.functional.scaled_dot_product_attention(
        t["query"][:, :, None], keys, values, attn_mask=t["mask"]
    )


ENTRY = Entry(
    op="slot_attention",
    passes=(Pass.FORWARD,),
    shapes=(
        Shape({"B": 64, "G": 8, "L": 128, "Hq": 4, "Hk": 2, "D": 16}, "the demo's model", BOTH),
        Shape(
            {"B": 8, "G": 8, "L": 1024, "Hq": 16, "Hk": 2, "D": 128},
            "Qwen2.5-VL-3B, few rows",
            BOTH,
        ),
        Shape({"B": 64, "G": 8, "L": 1024, "Hq": 16, "Hk": 2, "D": 128}, "Qwen2.5-VL-3B", GPU),
        Shape(
            {"B": 256, "G": 8, "L": 2048, "Hq": 16, "Hk": 2, "D": 128}, "Qwen2.5-VL-3B, long", GPU
        ),
    ),
    make_inputs=make_inputs,
    ours=forward_only(attend),
    peers=(
        Peer("masked SDPA", forward_only(masked)),
        Peer("SDPA, keys repeated", forward_only(repeated)),
    ),
    # Keys and values: each prompt once, and half of each slot on average.
    bytes_moved=lambda s, dtype, which: int(
        (s["B"] // s["G"] + s["B"] / 2) * s["L"] * s["Hk"] * s["D"] * dtype.itemsize
    ),
    flops=lambda s, which: 3 * s["B"] * s["L"] * s["Hq"] * s["D"],
    tests="tests/ops/test_slot_attention.py",
)
