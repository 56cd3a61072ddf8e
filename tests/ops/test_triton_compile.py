"""Every Triton configuration compiles for sm_80, sm_90 and sm_100, with no GPU in sight."""

import pytest
import torch

triton = pytest.importorskip("triton")

from latent_rl.kernels.nearest_code import triton_impl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.slow

CAPABILITIES = (80, 90, 100)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The paper's codebook; K and D only bound loops.
NUM_CODES, WIDTH = 128, 2048
SCREENS = [(dtype, config) for dtype, rows in triton_impl.CONFIGS.items() for _, config in rows]
# Shared memory a block may have, from CUDA's table of compute capabilities.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


def compiled(kernel, signature, constants, capability, **options):
    source = ASTSource(
        kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "config"), SCREENS)
def test_screen_compiles_and_uses_the_matrix_unit(dtype, config, capability) -> None:
    pointer = f"*{TYPES[dtype]}"
    signature = {
        "x_ptr": pointer,
        "codebook_ptr": pointer,
        "offset_ptr": "*fp32",
        "reach_ptr": "*fp32",
        "code_ptr": "*i64",
        "ambiguous_ptr": "*i8",
        "N": "i32",
        "error_unit": "fp32",
    }
    constants = {
        "K": NUM_CODES,
        "D": WIDTH,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_D": config.block_d,
    }
    kernel = compiled(
        triton_impl._nearest_code_screen_kernel,
        signature,
        constants,
        capability,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    # float32 runs in full precision on the ordinary cores for now.
    assert (MATRIX_UNIT[capability] in kernel.asm["ptx"]) == (dtype != torch.float32)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("dtype", "metric"),
    [(torch.float32, 0), (torch.float16, 0), *((torch.bfloat16, metric) for metric in range(3))],
)
def test_finish_compiles(dtype, capability, metric) -> None:
    pointer = f"*{TYPES[dtype]}"
    signature = {
        "x_ptr": pointer,
        "codebook_ptr": pointer,
        "offset_ptr": "*fp32",
        "code_ptr": "*i64",
        "ambiguous_ptr": "*i8",
        "distance_ptr": "*fp32",
        "N": "i32",
    }
    constants = {
        "K": NUM_CODES,
        "D": WIDTH,
        "METRIC": metric,
        "BLOCK_K": triton_impl.EXACT_BLOCK_K,
        "BLOCK_D": triton_impl.EXACT_BLOCK_D,
    }
    kernel = compiled(
        triton_impl._nearest_code_finish_kernel, signature, constants, capability, num_warps=1
    )
    assert kernel.asm["cubin"]
