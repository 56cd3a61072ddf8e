"""gated_merge's Triton row with no GPU: in the interpreter, and compiled for each architecture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from latent_rl.kernels.gated_merge import triton_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
# Shared memory a block may have, from CUDA's table of compute capabilities.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CONFIGS = [
    (capability, config) for capability, rows in triton_impl.CONFIGS.items() for _, config in rows
]


def test_in_the_interpreter() -> None:
    """In a process of its own: the interpreter must be asked for before Triton is imported."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/ops/merge_interpreter_checks.py",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_every_batch_size_and_architecture_has_a_configuration() -> None:
    assert set(triton_impl.CONFIGS) == set(MATRIX_UNIT)
    for rows in triton_impl.CONFIGS.values():
        limits = [largest for largest, _ in rows]
        assert limits == sorted(limits)
        assert limits[-1] > 1 << 40


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [2048, 2000])
@pytest.mark.parametrize("element", ["*bf16", "*fp16"])
@pytest.mark.parametrize(("capability", "config"), CONFIGS)
def test_compiles_and_uses_the_matrix_unit(capability, config, element, hidden) -> None:
    signature = {
        "e_ptr": element,
        "w_gate_ptr": element,
        "w_up_ptr": element,
        "table_gate_ptr": "*fp32",
        "table_up_ptr": "*fp32",
        "code_ptr": "*i64",
        "pre_gate_ptr": element,
        "pre_up_ptr": element,
        "activation_ptr": element,
        "N": "i32",
        "e_stride": "i32",
        "w_stride": "i32",
    }
    # 2000 is no multiple of a step: the other branch of the loop.
    constants = {
        "K": 128,
        "H": hidden,
        "I": 11008,
        "BLOCK_N": config.block_n,
        "BLOCK_I": config.block_i,
        "BLOCK_H": config.block_h,
        "GROUP": triton_impl.GROUP_N,
        "KEEP": hidden == 2048,
    }
    # torch aligns its memory, and real widths are multiples of 16: what the launcher finds out.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name != "N"}
    source = ASTSource(
        triton_impl._gated_merge_fwd_kernel,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs=aligned,
    )
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    assert MATRIX_UNIT[capability] in kernel.asm["ptx"]
    # Sixteen bytes at a time, copied while the matrix unit works.
    assert "cp.async.cg.shared.global" in kernel.asm["ptx"]
