"""gated_merge: one merge block with hard codes, forward and backward."""

from __future__ import annotations

import torch

from benchmarks.registry import Call, Entry, Inputs, Peer, Shape
from latent_rl import ops

WEIGHTS = ("w_gate", "w_up", "w_down")


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    n, hidden, inner, size = shape["N"], shape["H"], shape["I"], shape["K"]

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*sizes, generator=generator)).to(device, dtype)

    return {
        "e": normal(n, hidden),
        "codes": torch.randint(size, (n,), generator=generator).to(device),
        "codebook": normal(size, hidden),
        "w_gate": normal(inner, 2 * hidden, scale=hidden**-0.5),
        "w_up": normal(inner, 2 * hidden, scale=hidden**-0.5),
        "w_down": normal(hidden, inner, scale=inner**-0.5),
    }


def leaves(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {
        name: value.clone().requires_grad_() if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def ours(inputs: Inputs) -> Call:
    t = leaves(inputs)
    wanted = [value for value in t.values() if value.requires_grad]

    def call() -> None:
        out = ops.gated_merge(
            t["e"], t["codes"], t["codebook"], t["w_gate"], t["w_up"], t["w_down"]
        )
        torch.autograd.grad(out.sum(), wanted)

    return call


def concatenated(inputs: Inputs) -> Call:
    """The dense form: gather, concatenate, three wide products."""
    t = leaves(inputs)
    wanted = [value for value in t.values() if value.requires_grad]

    def call() -> None:
        joined = torch.cat([t["e"], t["codebook"][t["codes"]]], -1)
        inner = torch.nn.functional.silu(joined @ t["w_gate"].T) * (joined @ t["w_up"].T)
        torch.autograd.grad((inner @ t["w_down"].T).sum(), wanted)

    return call


def paper_one_hot(inputs: Inputs) -> Call:
    """One-hot codes through a Linear layer, then the dense form, as in the paper's code."""
    t = leaves(inputs)
    wanted = [value for value in t.values() if value.requires_grad]

    def call() -> None:
        one_hot = torch.nn.functional.one_hot(t["codes"], len(t["codebook"])).to(t["e"].dtype)
        joined = torch.cat([t["e"], one_hot @ t["codebook"]], -1)
        inner = torch.nn.functional.silu(joined @ t["w_gate"].T) * (joined @ t["w_up"].T)
        torch.autograd.grad((inner @ t["w_down"].T).sum(), wanted)

    return call


def multiply_adds(shape: Shape) -> int:
    """Forward plus backward of the table form: the code half costs K rows, not N."""
    n, hidden, inner, size = shape["N"], shape["H"], shape["I"], shape["K"]
    return 3 * 2 * (3 * n * hidden * inner + 2 * size * hidden * inner)


ENTRY = Entry(
    op="gated_merge",
    shapes=(
        Shape({"N": 1024, "H": 1024, "I": 2816, "K": 128}, "a 0.5B model"),
        Shape({"N": 2048, "H": 128, "I": 256, "K": 64}, "the demo's model"),
    ),
    make_inputs=make_inputs,
    ours=ours,
    peers=(Peer("concatenated", concatenated), Peer("one-hot x Linear (paper)", paper_one_hot)),
    bytes_moved=lambda s, dtype: (
        (4 * s["N"] * (s["H"] + s["I"]) + 10 * s["H"] * s["I"]) * dtype.itemsize
    ),
    flops=multiply_adds,
    tests="tests/ops/test_gated_merge.py",
)
