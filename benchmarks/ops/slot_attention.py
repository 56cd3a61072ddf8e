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
    """Slots between half full and full, as in the middle of a rollout."""
    generator = torch.Generator().manual_seed(0)
    rows, length, heads, key_heads, dim = (shape[s] for s in ("B", "L", "Hq", "Hk", "D"))
    cached = (rows, length, key_heads, dim)
    ends = torch.randint(length // 2, length + 1, (rows,), generator=generator).to(device)
    return {
        "query": torch.randn(rows, heads, dim, generator=generator).to(device, dtype),
        "keys": torch.randn(cached, generator=generator).to(device, dtype),
        "values": torch.randn(cached, generator=generator).to(device, dtype),
        "begins": torch.zeros_like(ends),
        "ends": ends,
        "mask": (torch.arange(length, device=device) < ends[:, None])[:, None, None],
    }


def attend(t: Inputs) -> Tensor:
    return ops.slot_attention(t["query"], t["keys"], t["values"], t["begins"], t["ends"])


def masked(t: Inputs) -> Tensor:
    """torch's fused attention under a mask, the queries of a key head packed as its rows."""
    rows, heads, dim = t["query"].shape
    key_heads = t["keys"].shape[2]
    return torch.nn.functional.scaled_dot_product_attention(
        t["query"].view(rows, key_heads, heads // key_heads, dim),
        t["keys"].transpose(1, 2),
        t["values"].transpose(1, 2),
        attn_mask=t["mask"],
    )


def repeated(t: Inputs) -> Tensor:
    """The form of transformers before 5.2x: keys repeated for every query head."""
    group = t["query"].shape[1] // t["keys"].shape[2]
    keys, values = (t[n].transpose(1, 2).repeat_interleave(group, 1) for n in ("keys", "values"))
    return torch.nn.functional.scaled_dot_product_attention(
        t["query"][:, :, None], keys, values, attn_mask=t["mask"]
    )


ENTRY = Entry(
    op="slot_attention",
    passes=(Pass.FORWARD,),
    shapes=(
        Shape({"B": 64, "L": 128, "Hq": 4, "Hk": 2, "D": 16}, "the demo's model", BOTH),
        Shape({"B": 8, "L": 1024, "Hq": 16, "Hk": 2, "D": 128}, "Qwen2.5-VL-3B, few rows", BOTH),
        Shape({"B": 64, "L": 1024, "Hq": 16, "Hk": 2, "D": 128}, "Qwen2.5-VL-3B", GPU),
        Shape({"B": 256, "L": 2048, "Hq": 16, "Hk": 2, "D": 128}, "Qwen2.5-VL-3B, long", GPU),
    ),
    make_inputs=make_inputs,
    ours=forward_only(attend),
    peers=(
        Peer("masked SDPA", forward_only(masked)),
        Peer("SDPA, keys repeated", forward_only(repeated)),
    ),
    # Three quarters of the slots are visible on average, keys and values each.
    bytes_moved=lambda s, dtype, which: int(
        1.5 * s["B"] * s["L"] * s["Hk"] * s["D"] * dtype.itemsize
    ),
    flops=lambda s, which: 3 * s["B"] * s["L"] * s["Hq"] * s["D"],
    tests="tests/ops/test_slot_attention.py",
)
