"""Every Triton configuration compiles for sm_80, sm_90 and sm_100, with no GPU in sight.

What a compiled kernel shows without running: the matrix unit it uses, its shared memory, and, from
ptxas, that nothing is spilled.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from latent_rl.kernels.nearest_code import configs, prepare, rerank, screen  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.slow

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Shared memory a block may have, from CUDA's table of compute capabilities.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# How the PTX of each architecture names a product of tf32 numbers.
TF32 = {80: r"mma\.sync.*tf32", 90: r"wgmma.*tf32", 100: r"tcgen05\.mma.*kind::tf32"}
POINTERS = {
    "code_ptr": "*i64",
    "list_ptr": "*i64",
    "count_ptr": "*i32",
    "part_code_ptr": "*i32",
    "value_ptr": "*fp64",
    "arrived_ptr": "*i32",
}
EXTRAS = {"stride_g": "i64", "stride_n": "i64", "N": "i32"}


def compiled(kernel, dtype, constants, architecture, **options):
    """A kernel compiled as the launcher specialises it: pointers and row strides divide by 16."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            rows = name in ("x_ptr", "codebook_ptr", "table_ptr")
            signature[name] = f"*{TYPES[dtype]}" if rows else POINTERS.get(name, "*fp32")
        else:
            signature[name] = EXTRAS.get(name, "fp32")
        if name.endswith("_ptr") or name.startswith("stride"):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def check_assembly(kernel, architecture, folder: Path, spilled_bytes: int = 0) -> None:
    """ptxas spills no more than that and does not serialize asynchronous products."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("ptxas is not installed")
    source = folder / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    name = f"sm_{architecture}" + ("a" if architecture >= 90 else "")
    done = subprocess.run(
        [ptxas, "-v", f"--gpu-name={name}", str(source), "-o", str(folder / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert spills, done.stderr
    assert sum(map(int, spills)) <= spilled_bytes, done.stderr
    assert "serialized" not in done.stderr


def screens():
    """(architecture, dtype, D, configuration, metric flags) of every row of the table."""
    for architecture in configs.ARCHITECTURES:
        for dtype in TYPES:
            for widest, fewest, _ in configs.screens(architecture, dtype.itemsize):
                width = min(widest, 2048)
                config = configs.choose(architecture, dtype, max(fewest, 1), width)
                yield pytest.param(
                    architecture,
                    dtype,
                    width,
                    config,
                    id=f"sm_{architecture}-{TYPES[dtype]}-{width}-{config.block_n}",
                )


@pytest.mark.parametrize("num_codes", [128, 1024])
@pytest.mark.parametrize(("architecture", "dtype", "width", "config"), list(screens()))
def test_screen(architecture, dtype, width, config, num_codes, tmp_path) -> None:
    constants = {
        "K": num_codes,
        "D": width,
        "ROUND": dtype == torch.float32,
        "SHIFT": dtype == torch.float32,
        "SCALED": dtype != torch.float32,
        "SPLITS": 1,
        "SPLIT_K": num_codes,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_D": config.block_d,
    }
    kernel = compiled(
        screen._nearest_code_screen_kernel,
        dtype,
        constants,
        architecture,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_BYTES[architecture]
    assert MATRIX_UNIT[architecture] in ptx
    assert bool(re.search(TF32[architecture], ptx)) == (dtype == torch.float32)
    check_assembly(kernel, architecture, tmp_path)


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_chains_of_additions_on_the_matrix_unit_end_with_a_tile(architecture, tmp_path) -> None:
    """The bound counts on it: every step's product starts from zero and is added elsewhere."""
    config = configs.choose(architecture, torch.bfloat16, 8192, 2048)
    constants = {
        "K": 128,
        "D": 2048,
        "ROUND": False,
        "SHIFT": False,
        "SCALED": False,
        "SPLITS": 1,
        "SPLIT_K": 128,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_D": config.block_d,
    }
    kernel = compiled(
        screen._nearest_code_screen_kernel,
        torch.bfloat16,
        constants,
        architecture,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    dots = re.findall(
        r"= (?:tt\.dot|ttng\.tc_gen5_mma|ttng\.warp_group_dot) .*", kernel.asm["ttir"]
    )
    assert dots
    # Their accumulator is the constant zero, never a value carried around the loop.
    assert all(re.search(r", %cst\w*(?:,| :)", dot) for dot in dots), dots


def small_kernels():
    """(kernel, its constants beside K and D, its warps) of what runs around the screen."""
    tile = configs.choose_prepare(2048)
    yield (
        prepare._nearest_code_mean_kernel,
        {"SAMPLE": 128, "BLOCK_D": configs.MEAN_BLOCK_D},
        4,
    )
    yield (
        prepare._nearest_code_prepare_kernel,
        {"CENTRE": None, "BLOCK_K": tile.block_k, "BLOCK_D": tile.block_d},
        tile.num_warps,
    )
    yield screen._nearest_code_merge_kernel, {"SPLITS": 8, "BLOCK_N": configs.MERGE_BLOCK_N}, 4
    for again in (configs.RERANK, configs.RERANK_MANY):
        constants = {
            "ROUND": None,
            "SHIFT": None,
            "SCALED": False,
            "BLOCK_N": again.block_n,
            "BLOCK_K": again.block_k,
            "BLOCK_D": None,
            "EXACT_D": again.exact_d,  # of the dtype
        }
        yield rerank._nearest_code_rerank_kernel, constants, again.num_warps
    yield (
        rerank._nearest_code_distance_kernel,
        {"BLOCK_N": configs.DISTANCE_BLOCK_N, "BLOCK_D": configs.DISTANCE_BLOCK_D},
        4,
    )


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("kernel", "constants", "warps"),
    [
        pytest.param(kernel, rest, warps, id=f"{kernel.__name__}-{rest.get('BLOCK_N', 0)}")
        for kernel, rest, warps in small_kernels()
    ],
)
def test_small_kernels(kernel, constants, warps, dtype, architecture, tmp_path) -> None:
    rounds = dtype == torch.float32
    given = {name: rounds if value is None else value for name, value in constants.items()}
    for metric in range(3) if "METRIC" in kernel.arg_names else (0,):
        everything = {"K": 128, "D": 2048, "METRIC": metric, **given}
        if kernel is rerank._nearest_code_rerank_kernel:
            everything["EXACT_D"] = everything["EXACT_D"](dtype.itemsize)
            everything["BLOCK_D"] = max(
                configs.rerank_block_d(config, 2048)
                for _, _, config in configs.screens(architecture, dtype.itemsize)
            )
        known = {name: everything[name] for name in kernel.arg_names if name in everything}
        limit = {}
        if kernel in (rerank._nearest_code_rerank_kernel, prepare._nearest_code_prepare_kernel):
            limit["maxnreg"] = configs.MOST_REGISTERS
        built = compiled(kernel, dtype, known, architecture, num_warps=warps, **limit)
        assert built.metadata.shared <= SHARED_BYTES[architecture]
        # Loop bounds of the second search, with all 255 registers taken: a few words on sm_80.
        check_assembly(built, architecture, tmp_path, 64 if limit and architecture == 80 else 0)
