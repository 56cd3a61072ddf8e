"""The Hopper screen of nearest_code on the emulator: it decides rightly, or lists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from latent_rl.native import nearest_code_hopper as native
from tests.ops.search_cases import hostile_searches

from .memory import fenced

METRICS = ("l2", "cosine", "dot")
UNUSABLE, WORST = -3.0e38, -2.5e38
# (G, N, K, D) and dtype: one tile and several of rows and of codes, one to four chunks of columns,
# ragged; more tiles of rows than the emulated device has processors.
CASES = (
    ((1, 1, 1, 8), torch.bfloat16),
    ((1, 300, 260, 64), torch.bfloat16),
    ((1, 130, 385, 72), torch.float16),
    ((2, 70, 129, 136), torch.bfloat16),
    ((1, 257, 300, 256), torch.float16),
    ((6, 20, 140, 16), torch.bfloat16),
)


class Prepared(NamedTuple):
    """What prepare.py makes of a codebook of 16-bit values, in torch."""

    table: Tensor
    bias: Tensor
    scale: Tensor | None
    limits: Tensor


def prepare(codebook: Tensor, metric: str) -> Prepared:
    usable = codebook.isfinite().all(-1)
    table = codebook.masked_fill(~usable[..., None], 0)
    square = table.double().square().sum(-1)
    scale = torch.where(square > 0, square.rsqrt(), 0) if metric == "cosine" else None
    bias = -0.5 * square if metric == "l2" else torch.zeros_like(square)
    length = square.sqrt() * (1 if scale is None else scale)
    limits = torch.zeros(len(codebook), 8)
    for place, values in ((0, length), (1, length), (3, -bias)):
        limits[:, place] = values.amax(-1) * 1.000001
    limits[:, 4] = 1 if scale is None else scale.amax(-1) * 1.000001
    return Prepared(
        table,
        torch.where(usable, bias, UNUSABLE).float(),
        None if scale is None else scale.float(),
        limits,
    )


def bounds(width: int) -> tuple[float, float, float]:
    """The README's formulas for one chain over the row, and keys of eight."""
    chain = -(-width // 64) * 64
    accumulation = chain * 2.0**-22 + -(-width // 64) * 2.0**-24 + 8 * 2.0**-23 + 2.0**-20
    return accumulation, (width + 8) * 2.0**-125, 1 + 2.0**-10 + width * 2.0**-23


class Screened(NamedTuple):
    codes: Tensor  # [G, N], -2 where not decided
    threshold: Tensor  # [G, N], of the others


def screen(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    within: tuple[float, float, float] | None = None,
) -> Screened:
    """The screen's verdict on every row; each is decided or listed, and once."""
    groups, n = x.shape[:2]
    prepared = prepare(codebook, metric)
    codes = torch.empty((groups, n), dtype=torch.int64)
    listed = torch.empty((groups, n), dtype=torch.int64)
    values = torch.empty((groups, n), dtype=torch.float32)
    codes.fill_(-2)
    count = torch.zeros(groups, dtype=torch.int32)
    given = [None if t is None else fenced(t) for t in prepared]
    native.screen(x, *given, (codes, listed, values, count), within or bounds(x.shape[2]))
    threshold = torch.full((groups, n), torch.nan)
    for g in range(groups):
        rows = listed[g, : count[g]]
        assert len(rows.unique()) == count[g], "a row is listed twice"
        assert (codes[g][rows] == -2).all(), "a row is decided and listed"
        threshold[g][rows] = values[g, : count[g]]
    assert (codes == -2).sum() == count.sum(), "a row is neither decided nor listed"
    return Screened(codes, threshold)


def exact_scores(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """float64 [G, N, K]; -inf for codes that must not be chosen."""
    wide, table = x.double(), codebook.double()
    scores = wide @ table.transpose(1, 2)
    square = table.square().sum(-1)
    if metric == "l2":
        scores -= square[:, None] / 2
    elif metric == "cosine":
        scores = torch.where(square[:, None] > 0, scores / square.sqrt()[:, None], 0)
    return scores.masked_fill(~codebook.isfinite().all(-1)[:, None], -torch.inf)


def check(x: Tensor, codebook: Tensor, metric: str, got: Screened) -> None:
    scores = exact_scores(x, codebook, metric)
    finite = x.isfinite().all(-1)
    decided = got.codes != -2
    assert not decided[~finite].any()
    best = scores.nan_to_num(nan=-torch.inf).amax(-1)
    mine = scores.gather(-1, got.codes.clamp(min=0)[..., None])[..., 0]
    assert (mine == best)[decided].all()
    # The nearest code of a listed row must reach its threshold in the second search.
    waiting = ~decided & finite & (best > WORST)
    assert not (best < got.threshold.double())[waiting].any()


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.fixture
def module(emulated):
    return emulated("nearest_code", modules=("nearest_code_hopper",))


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_rows_are_decided_rightly_or_listed(module, in_every_order, shape, dtype) -> None:
    groups, n, num_codes, width = shape
    x = fenced(normal(groups, n, width, dtype=dtype))
    codebook = normal(groups, num_codes, width, dtype=dtype)
    got = in_every_order(module, lambda: screen(x, codebook, "l2"))
    check(x, codebook, "l2", got)
    assert (got.codes == -2).float().mean() < 0.1


def test_every_code_can_win_from_every_row(module) -> None:
    # Every place of a tile of rows and of codes: a row's nearest code is itself.
    codebook = normal(1, 384, 32)
    x = codebook[:, torch.randperm(384)]
    got = screen(x, codebook, "l2")
    check(x, codebook, "l2", got)
    assert len(got.codes.unique()) > 380


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", hostile_searches(torch.float32))
def test_hostile_searches(module, name, metric) -> None:
    x, codebook = hostile_searches(torch.bfloat16)[name]
    width = x.shape[-1]
    if width > native.WIDEST:
        x, codebook = x[..., : native.WIDEST], codebook[..., : native.WIDEST]
    x, codebook = native.copyable(x), native.copyable(codebook)
    check(x, codebook, metric, screen(x, codebook, metric))


def near_ties(apart: int) -> tuple[Tensor, Tensor]:
    """Every code has one twin, ``apart`` places away; sums of that size hardly tell them apart."""
    places = torch.arange(256)
    x, codebook = normal(1, 512, 256).abs(), normal(1, 256, 256).abs()
    codebook = codebook[:, places & ~apart]
    # What differs enters one twin's sum first and the other's last: they are cut apart.
    first = (places & apart == 0)[:, None]
    small = normal(1, 256, 8).abs() * 2.0**-15
    codebook[..., :8] = torch.where(first, small, 0)
    codebook[..., -8:] = torch.where(first, 0, small)
    return x, codebook


# Twins in another slot of a stretch, in another lane, fragment, stretch and tile.
@pytest.mark.parametrize("apart", [1, 2, 8, 32, 128])
def test_the_bound_is_needed_and_enough(module, apart) -> None:
    x, codebook = near_ties(apart)
    check(x, codebook, "dot", screen(x, codebook, "dot"))
    unbounded = screen(x, codebook, "dot", (0.0, 0.0, 0.0))
    with pytest.raises(AssertionError):
        check(x, codebook, "dot", unbounded)


def test_overflow_decides_nothing(module) -> None:
    x, codebook = (normal(1, 20, 64) * 1e19 for _ in range(2))
    got = screen(x, codebook, "dot")
    assert (got.codes == -2).all()


def test_rows_that_lie_apart(module) -> None:
    x, codebook = normal(2, 40, 24), normal(2, 50, 24)
    expected = screen(x, codebook, "l2")
    wide = torch.full((2, 40, 3, 24), torch.nan, dtype=x.dtype)
    wide[:, :, 1] = x
    assert native.copyable(wide[:, :, 1]).data_ptr() == wide[:, :, 1].data_ptr()
    shifted = torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape)
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (wide[:, :, 1], shifted, swapped, x.mT.contiguous().mT):
        got = screen(native.copyable(other), codebook, "l2")
        assert torch.equal(got.codes, expected.codes)


def test_what_the_copy_engine_cannot_read_is_refused(module) -> None:
    x, codebook = normal(1, 4, 24), normal(1, 4, 24)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        screen(x[..., 1:17], codebook[..., :16].contiguous(), "l2")
    with pytest.raises(ValueError, match="dim at most 256, got 4 and 264"):
        screen(normal(1, 4, 264), normal(1, 4, 264), "l2")
    with pytest.raises(TypeError, match="x must be bfloat16 or float16"):
        screen(x.float(), codebook.float(), "l2")


def test_no_rows(module) -> None:
    assert screen(normal(2, 0, 16), normal(2, 3, 16), "l2").codes.shape == (2, 0)


def test_the_search_around_it() -> None:
    """In a process of its own: Triton's interpreter must be asked for before Triton is imported."""
    pytest.importorskip("triton")
    tests = Path(__file__).with_name("hopper_search_checks.py")
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
