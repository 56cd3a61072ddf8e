"""nearest_code: the code closest to each row, against GEMM-based searches."""

from __future__ import annotations

import torch

from benchmarks.registry import Call, Entry, Inputs, Peer, Shape
from latent_rl import ops


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape["N"], shape["D"], generator=generator)
    codebook = torch.randn(shape["K"], shape["D"], generator=generator)
    return {"x": x.to(device, dtype), "codebook": codebook.to(device, dtype)}


def ours(inputs: Inputs) -> Call:
    return lambda: ops.nearest_code(inputs["x"], inputs["codebook"])


def chunked_gemm(inputs: Inputs, rows: int = 8192) -> Call:
    """The same contraction and nothing else: the unit in which the CPU targets are written."""
    x, codebook = inputs["x"], inputs["codebook"]
    out = torch.empty(min(rows, len(x)), len(codebook), dtype=x.dtype, device=x.device)

    def call() -> None:
        for start in range(0, len(x), rows):
            block = x[start : start + rows]
            torch.mm(block, codebook.T, out=out[: len(block)])

    return call


def mm_argmin(inputs: Inputs) -> Call:
    x, codebook = inputs["x"], inputs["codebook"]

    def call() -> torch.Tensor:
        norms = codebook.square().sum(1)
        return torch.addmm(norms, x, codebook.T, alpha=-2).argmin(1)

    return call


def cdist(inputs: Inputs) -> Call:
    return lambda: torch.cdist(inputs["x"], inputs["codebook"]).argmin(1)


def sklearn_argmin(inputs: Inputs) -> Call:
    from sklearn.metrics import pairwise_distances_argmin

    if inputs["x"].is_cuda:
        raise ImportError("scikit-learn runs on the CPU only")
    x, codebook = inputs["x"].float().numpy(), inputs["codebook"].float().numpy()
    return lambda: pairwise_distances_argmin(x, codebook)


def faiss_flat(inputs: Inputs) -> Call:
    import faiss

    if inputs["x"].is_cuda:
        raise ImportError("only the CPU index is compared here")
    x, codebook = inputs["x"].float().numpy(), inputs["codebook"].float().numpy()
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook)
    return lambda: index.search(x, 1)


ENTRY = Entry(
    op="nearest_code",
    shapes=(
        Shape({"N": 8192, "D": 2048, "K": 128}, "hidden state of a 3B model, the paper's codebook"),
        Shape({"N": 65536, "D": 64, "K": 1024}, "image tokenizer"),
        Shape({"N": 8192, "D": 256, "K": 8192}, "large codebook"),
    ),
    make_inputs=make_inputs,
    ours=ours,
    peers=(
        Peer("gemm", chunked_gemm),
        Peer("mm+argmin", mm_argmin),
        Peer("cdist", cdist),
        Peer("scikit-learn", sklearn_argmin),
        Peer("faiss", faiss_flat),
    ),
    bytes_moved=lambda s, dtype: (s["N"] + s["K"]) * s["D"] * dtype.itemsize + 8 * s["N"],
    flops=lambda s: 2 * s["N"] * s["K"] * s["D"],
    tests="tests/ops/test_nearest_code.py",
)
