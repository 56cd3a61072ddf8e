"""nearest_code: the code closest to each row, against searches of every kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import UNITS, Call, Entry, Goal, Inputs, Pass, Peer, Shape
from benchmarks.steps import forward_only
from latent_rl import backends, ops

FORWARD = Pass.FORWARD
# Both dtypes on both devices; the float32 rows are the certified exact ones.
BOTH = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape["N"], shape["D"], generator=generator, device=device)
    codebook = torch.randn(shape["K"], shape["D"], generator=generator, device=device)
    return {"x": x.to(device, dtype), "codebook": codebook.to(device, dtype)}


def search(inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
    return ops.nearest_code(inputs["x"], inputs["codebook"])


def chunked_gemm(inputs: Inputs, which: Pass, rows: int = 8192) -> Call:
    """The same contraction and nothing else; in float32 on the CPU."""
    x, codebook = inputs["x"], inputs["codebook"]
    if not x.is_cuda:
        x, codebook = x.float(), codebook.float()
    out = torch.empty(min(rows, len(x)), len(codebook), dtype=x.dtype, device=x.device)

    def call() -> None:
        for start in range(0, len(x), rows):
            block = x[start : start + rows]
            torch.mm(block, codebook.T, out=out[: len(block)])

    return call


def mm_argmin(inputs: Inputs) -> Tensor:
    x, codebook = inputs["x"], inputs["codebook"]
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def mm_argmin_compiled(inputs: Inputs, which: Pass) -> Call:
    compiled = torch.compile(mm_argmin, dynamic=False)
    return lambda: compiled(inputs)


def cdist(inputs: Inputs) -> Tensor:
    return torch.cdist(inputs["x"], inputs["codebook"]).argmin(1)


def sklearn_argmin(inputs: Inputs, which: Pass) -> Call:
    from sklearn.metrics import pairwise_distances_argmin

    x, codebook = inputs["x"].numpy(), inputs["codebook"].numpy()
    return lambda: pairwise_distances_argmin(x, codebook)


def faiss_flat(inputs: Inputs, which: Pass) -> Call:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    x, codebook = inputs["x"].float().numpy(), inputs["codebook"].float().numpy()
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook)
    return lambda: index.search(x, 1)[1][:, 0]


def faiss_gpu(inputs: Inputs, which: Pass) -> Call:
    """The search over given vectors, without an index, on torch's tensors in place."""
    import faiss
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()
    x, codebook = inputs["x"].float(), inputs["codebook"].float()
    return lambda: faiss.knn_gpu(resources, x, codebook, 1)[1][:, 0]


def flash_kmeans(inputs: Inputs, which: Pass) -> Call:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    x, codebook = inputs["x"][None], inputs["codebook"][None]
    # Its k-means has the rows' norms from before; those of the codes it computes itself.
    norms = x.float().square().sum(-1)
    return lambda: euclid_assign_triton(x, codebook, norms)[0]


def cuvs_brute_force(inputs: Inputs, which: Pass) -> Call:
    from cuvs.neighbors import brute_force

    x, codebook = inputs["x"].float(), inputs["codebook"].float()
    index = brute_force.build(codebook, metric="sqeuclidean")
    neighbors = torch.empty(len(x), 1, dtype=torch.int64, device=x.device)
    distances = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)

    def call() -> Tensor:
        brute_force.search(index, x, 1, neighbors=neighbors, distances=distances)
        return neighbors[:, 0]

    return call


def raft_fused(inputs: Inputs, which: Pass) -> Call:
    from pylibraft.distance import fused_l2_nn_argmin

    x, codebook = inputs["x"].float(), inputs["codebook"].float()
    out = torch.empty(len(x), dtype=torch.int32, device=x.device)

    def call() -> Tensor:
        fused_l2_nn_argmin(x, codebook, out)
        return out

    return call


def distances(inputs: Inputs, codes: Tensor, rows: int = 8192) -> Tensor:
    """float64 squared distances of rows to the codes given, from differences."""
    x, codebook = inputs["x"], inputs["codebook"].double()
    blocks = (
        (x[start : start + rows].double() - codebook[codes[start : start + rows]]).square().sum(1)
        for start in range(0, len(x), rows)
    )
    return torch.cat(list(blocks))


def exact_distances(inputs: Inputs, rows: int = 8192) -> Tensor:
    """The least float64 squared distance of every row."""
    x, codebook = inputs["x"], inputs["codebook"].double()
    norms = codebook.square().sum(1)
    codes = [
        torch.addmm(norms, x[start : start + rows].double(), codebook.T, alpha=-2).argmin(1)
        for start in range(0, len(x), rows)
    ]
    return distances(inputs, torch.cat(codes)).cpu()


def wrong_rows(inputs: Inputs, result: Any, least: Tensor) -> dict[str, float]:
    """Share of rows whose code is farther than the nearest, in float64.

    1e-12 is far above float64's rounding of these distances and far below float32's.
    """
    codes = torch.as_tensor(result, device=inputs["x"].device).long()
    wrong = distances(inputs, codes) > least.to(codes.device) * (1 + 1e-12)
    return {"wrong_rows": float(wrong.sum()), "wrong_share": float(wrong.double().mean())}


def with_offset(inputs: Inputs) -> Inputs:
    """Everything moved by 8 standard deviations: what a codebook far from the origin looks like.

    Distances stay what they were, while norms and products grow until their difference is rounding.
    """
    return {name: value + 8 for name, value in inputs.items()}


def reranked(inputs: Inputs) -> dict[str, float]:
    """Share of rows that the serving backend's screen left undecided, where it tells."""
    x, codebook = inputs["x"], inputs["codebook"]
    row = backends.resolve("nearest_code", backends.Request(x.device, x.dtype))
    try:
        search_with_stats = row.function("nearest_code_with_stats")
    except AttributeError:
        return {}
    stats = search_with_stats(x[None], codebook[None], "l2")[2]
    return {"reranked_share": stats.fraction_reranked}


SCREENED = Goal(1 / 0.8, UNITS["cpu"])


def cpu_goals(*float32: Goal) -> dict[tuple[str, str, Pass], tuple[Goal, ...]]:
    """Ahead of every peer in float32; a 16-bit screen takes at most 0.8 of the float32 product."""
    return {
        ("cpu", "float32", FORWARD): (*float32, Goal(1.0, "every peer")),
        ("cpu", "bfloat16", FORWARD): (SCREENED,),
    }


WIDE = cpu_goals(Goal(1 / 1.10, UNITS["cpu"]), SCREENED)
NARROW = cpu_goals(Goal(1.2, "FAISS"))

ENTRY = Entry(
    op="nearest_code",
    passes=(FORWARD,),
    shapes=(
        Shape(
            {"N": 8192, "D": 2048, "K": 128},
            "hidden state of a 3B model, the paper's codebook",
            BOTH,
            {
                **WIDE,
                ("cuda", "bfloat16", FORWARD): (
                    Goal(at_most_us=13),
                    Goal(1.8, "flash-kmeans"),
                ),
            },
        ),
        Shape(
            {"N": 65536, "D": 64, "K": 1024},
            "image tokenizer",
            BOTH,
            {
                **NARROW,
                ("cuda", "bfloat16", FORWARD): (
                    Goal(at_most_us=22),
                    Goal(1.5, "flash-kmeans"),
                    Goal(3.0, "mm+argmin"),
                ),
            },
        ),
        Shape(
            {"N": 8192, "D": 256, "K": 8192},
            "large codebook",
            {"cpu": BOTH["cpu"]},
            WIDE,
        ),
        Shape(
            {"N": 65536, "D": 16, "K": 1024},
            "narrow codes",
            {"cpu": BOTH["cpu"]},
            NARROW,
        ),
        Shape(
            {"N": 1_000_000, "D": 256, "K": 8192},
            "a million rows, large codebook",
            {"cuda": BOTH["cuda"]},
            {
                ("cuda", "bfloat16", FORWARD): (
                    Goal(at_most_us=7100),
                    Goal(1.0, UNITS["cuda"]),
                    Goal(1.35, "flash-kmeans"),
                    Goal(2.0, "mm+argmin"),
                )
            },
        ),
    ),
    make_inputs=make_inputs,
    ours=forward_only(search),
    unit=chunked_gemm,
    peers=(
        Peer("FAISS", faiss_flat, "faiss-cpu", ("cpu",), note="float32 copies of bfloat16 input"),
        Peer("mm+argmin", forward_only(mm_argmin)),
        Peer("torch.compile", mm_argmin_compiled, note="of mm+argmin"),
        Peer("cdist", forward_only(cdist), dtypes=("float32",)),
        Peer("scikit-learn", sklearn_argmin, "scikit-learn", ("cpu",), ("float32",)),
        Peer(
            "flash-kmeans",
            flash_kmeans,
            "flash-kmeans",
            ("cuda",),
            note="norms given; float32 as TF32",
        ),
        Peer("FAISS GPU", faiss_gpu, "faiss-gpu", ("cuda",), own_stream=True, note="in float32"),
        Peer("cuVS", cuvs_brute_force, "cuvs", ("cuda",), own_stream=True, note="in float32"),
        Peer("RAFT fused", raft_fused, "pylibraft", ("cuda",), own_stream=True, note="in float32"),
    ),
    bytes_moved=lambda s, dtype, which: (
        (s["N"] + s["K"]) * s["D"] * dtype.itemsize + 8 * s["N"] + 4 * s["N"]
    ),
    flops=lambda s, which: 2 * s["N"] * s["K"] * s["D"],
    tests="tests/ops/test_nearest_code.py",
    truth=exact_distances,
    check=wrong_rows,
    hard=with_offset,
    stats=reranked,
)
