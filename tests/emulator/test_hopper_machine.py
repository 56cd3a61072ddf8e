"""The models of Hopper's instructions: they compute what the documents say, and find mistakes."""

from __future__ import annotations

import contextlib
import shutil
from types import ModuleType

import pytest
import torch
from torch import Tensor

from .build import COMPILER, HERE, Part, load
from .memory import fenced


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER} on this machine")
    files = HERE / "hopper_probes.cu", HERE / "hopper_probes.cpp"
    return load("hopper_probes", (Part("hopper_probes", *files),))


def product(probes: ModuleType, fault: str, rows: int = 64, width: int = 64) -> tuple[Tensor, ...]:
    """What the matrix unit finds, and what it should."""
    generator = torch.Generator().manual_seed(0)
    # Small integers: every order of the sums gives the same.
    left, right = (
        fenced(torch.randint(-8, 9, (n, width), generator=generator).bfloat16())
        for n in (rows, 128)
    )
    out = fenced(torch.full((64, 128), torch.nan))
    probes.hopper_probe(fault, left.data_ptr(), right.data_ptr(), out.data_ptr(), rows, width)
    exact = torch.zeros(64, 128)
    exact[:rows] = (left.float() @ right.float().T)[:64]
    return out, exact


@pytest.mark.parametrize(("rows", "width"), [(64, 64), (100, 64), (64, 40), (37, 8)])
def test_a_product_of_swizzled_copies(probes, in_every_order, rows, width) -> None:
    out, exact = in_every_order(probes, lambda: product(probes, "none", rows, width))
    assert torch.equal(out, exact)


@pytest.mark.parametrize("fault", ["no wait", "wrong parity", "read early", "off start"])
def test_a_mistake_shows_in_the_result(probes, fault) -> None:
    wrong = 0
    for order in ((0, 0), (1, 0), (2, 1), (2, 2)):
        probes.set_order(*order)
        with contextlib.suppress(RuntimeError):  # of copies that nobody waited for
            out, exact = product(probes, fault)
            wrong += not torch.equal(out, exact)
    assert wrong >= 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no init", "an mbarrier is used before its init"),
        ("few bytes", "more bytes arrive at an mbarrier than it expects"),
        ("many bytes", "deadlock: thread 0 waits for parity 0 of the mbarrier at byte 24576"),
        ("two arrivals", "more arrivals at an mbarrier than its count"),
        ("no fence", "products without wgmma.fence"),
        ("no commit", "a wait for products that were not committed"),
        ("no swizzle", "only descriptors with 128-byte swizzle"),
        ("lanes differ", "lanes of a warp issue different products"),
        ("off target", "a swizzled copy to byte 128, not a multiple of 1024"),
    ],
)
def test_what_would_hang_or_be_undefined_is_told(probes, fault, message) -> None:
    probes.set_order(2, 3)
    with pytest.raises(RuntimeError, match=message):
        product(probes, fault)


def test_copies_must_arrive_before_the_block_ends(probes) -> None:
    probes.set_order(1, 0)
    with pytest.raises(RuntimeError, match="ended with copies under way"):
        product(probes, "nobody waits")


def test_a_tensor_the_engine_cannot_read_is_refused(probes) -> None:
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled failed with CUresult 1"):
        product(probes, "none", width=12)
