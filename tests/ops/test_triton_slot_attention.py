"""slot_attention in Triton without a GPU: interpreted, and compiled for three generations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from latent_rl.kernels.slot_attention import triton_impl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tests.ops.test_triton_compile import MATRIX_UNIT, SHARED_BYTES, TYPES  # noqa: E402

pytestmark = pytest.mark.slow
CAPABILITIES = (80, 90, 100)
# (queries of a key head, width): Qwen2.5-VL-3B's, and a narrow head.
HEADS = ((8, 128), (2, 24))


def compiled(kernel, signature, constants, capability, **options):
    source = ASTSource(
        kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.timeout(900)
def test_in_the_interpreter() -> None:
    """In a process of its own: the interpreter must be asked for before Triton is imported."""
    tests = Path(__file__).with_name("triton_slot_attention_checks.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", triton_impl.CONFIGS)
@pytest.mark.parametrize(("group", "width"), HEADS)
def test_stretch_compiles_and_uses_the_matrix_unit(dtype, group, width, capability) -> None:
    config, pointer = triton_impl.CONFIGS[dtype], f"*{TYPES[dtype]}"
    strides = ("key_position", "key_head", "value_position", "value_head")
    signature = {
        "query_ptr": pointer,
        "keys_ptr": pointer,
        "values_ptr": pointer,
        "runs_ptr": "*i64",
        "top_ptr": "*fp32",
        "mass_ptr": "*fp32",
        "sum_ptr": "*fp32",
        "scale": "fp32",
        "positions": "i64",
        "longest": "i32",
        **dict.fromkeys(strides, "i64"),
        "stretches": "i32",
    }
    block = max(16, triton.next_power_of_2(width))
    constants = {
        "GROUP": group,
        "D": width,
        "E": width,
        "BLOCK_G": max(triton_impl.LEAST_QUERIES, group),
        "BLOCK_D": block,
        "BLOCK_E": block,
        "BLOCK_L": config.block_l,
        "STRETCH": config.stretch,
    }
    kernel = compiled(
        triton_impl._slot_attention_stretch_kernel,
        signature,
        constants,
        capability,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    if dtype != torch.float32:
        # Tiles of 16 rows are below what wgmma and tcgen05 take; mma.sync serves them everywhere.
        units = ("mma.sync", MATRIX_UNIT[capability])
        assert any(unit in kernel.asm["ptx"] for unit in units)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_join_compiles(capability) -> None:
    signature = {
        "top_ptr": "*fp32",
        "mass_ptr": "*fp32",
        "sum_ptr": "*fp32",
        "out_ptr": "*bf16",
        "stretches": "i32",
    }
    constants = {"E": 128, "BLOCK_E": 128, "STRETCHES": 8}
    kernel = compiled(
        triton_impl._slot_attention_join_kernel, signature, constants, capability, num_warps=1
    )
    assert kernel.asm["cubin"]
