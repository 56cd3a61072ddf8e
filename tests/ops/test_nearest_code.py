"""nearest_code: parity, edges, properties, compilation and errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_rl import ops
from tests.ops.search_cases import (
    METRICS,
    SIZES,
    TINY_SCALES,
    excess,
    hostile_searches,
    oracle,
    random_search,
    tiny_search,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# parity


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_random_rows_get_the_codes_of_the_oracle(backend, size, dtype, metric) -> None:
    x, codebook = random_search(size, dtype)
    codes, distance = ops.nearest_code(x, codebook, metric, return_distance=True)
    assert torch.equal(codes, oracle(x, codebook, metric))
    assert torch.equal(ops.nearest_code(x, codebook, metric), codes)
    assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hostile_searches(torch.float32))
def test_hostile_rows_get_a_nearest_code(backend, name, dtype, metric) -> None:
    x, codebook = hostile_searches(dtype)[name]
    codes, distance = ops.nearest_code(x, codebook, metric, return_distance=True)
    expected = oracle(x, codebook, metric)
    assert torch.equal(codes < 0, expected < 0)
    assert torch.equal(distance.isnan(), expected < 0)
    # Ids are equal wherever there is no tie; float64 sums in another order may break one.
    scale = x.double().nan_to_num(0, 0, 0).square().sum(-1).amax()
    assert (excess(x, codebook, codes, metric) <= 1e-14 * (1 + scale)).all()
    if name in ("duplicate codes", "exact ties") and metric != "cosine":
        assert torch.equal(codes, expected), "the lowest id wins an exact tie"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", TINY_SCALES)
def test_scores_below_float32_are_searched_exactly(backend, scale, dtype, metric) -> None:
    x, codebook = tiny_search(scale, dtype)
    codes = ops.nearest_code(x, codebook, metric)
    assert torch.equal(codes, oracle(x[None], codebook[None], metric)[0])


@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_those_of_the_definition(backend, metric) -> None:
    x, codebook = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.0], [9.0, 9.0]])
    codes, distance = ops.nearest_code(x, codebook, metric, return_distance=True)
    expected = {"l2": (0, 10.0), "cosine": (1, 1 - 63 / (5 * 162**0.5)), "dot": (1, -63.0)}[metric]
    assert codes.item() == expected[0]
    assert distance.item() == pytest.approx(expected[1], rel=1e-6)


# The interpreter took 214 s on two cores shared with other work, near the default limit.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_triton_in_the_interpreter() -> None:
    """In a process of its own: the interpreter must be asked for before Triton is imported."""
    pytest.importorskip("triton")
    tests = Path(__file__).with_name("triton_interpreter_checks.py")
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


# torch registration


def test_opcheck() -> None:
    x, codebook = random_search((2, 5, 4, 3), torch.float32)
    for op in (torch.ops.latent_rl.nearest_code, torch.ops.latent_rl.nearest_codes):
        torch.library.opcheck(op.default, (x, codebook, "l2"))


def test_compiled_equals_eager() -> None:
    x, codebook = torch.randn(9, 5), torch.randn(4, 5)
    compiled = torch.compile(ops.nearest_code, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, codebook), ops.nearest_code(x, codebook))


# edges


def test_no_rows(backend) -> None:
    codes, distance = ops.nearest_code(torch.empty(0, 3), torch.randn(2, 3), return_distance=True)
    assert codes.shape == distance.shape == (0,)


def test_strided_input(backend) -> None:
    x, codebook = torch.randn(6, 20), torch.randn(8, 20)
    expected = ops.nearest_code(x[:, ::2].contiguous(), codebook[:, ::2].contiguous())
    assert torch.equal(ops.nearest_code(x[:, ::2], codebook[:, ::2]), expected)
    assert torch.equal(ops.nearest_code(x.T.contiguous().T[:, ::2], codebook[:, ::2]), expected)


# properties


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 9), st.integers(0, 10**6))
def test_permuting_the_codebook_permutes_the_codes(n, num_codes, width, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    codebook = torch.randn(num_codes, width, generator=generator)
    order = torch.randperm(num_codes, generator=generator)
    codes = ops.nearest_code(x, codebook)
    assert torch.equal(order[ops.nearest_code(x, codebook[order])], codes)
    split = torch.cat(
        [ops.nearest_code(x[: n // 2], codebook), ops.nearest_code(x[n // 2 :], codebook)]
    )
    assert torch.equal(split, codes), "a row's code depends on its batch"
    assert torch.equal(ops.nearest_code(codebook[codes], codebook), codes), "quantising twice"


# errors

GOOD = (torch.zeros(4, 3), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("x", "codebook", "metric", "kind", "message"),
    [
        (
            GOOD[0],
            torch.zeros(2, 5),
            "l2",
            ValueError,
            r"codebook.shape\[-1\] must equal .*3.*got 5",
        ),
        (GOOD[0], torch.zeros(0, 3), "l2", ValueError, "at least one code"),
        (GOOD[0], GOOD[1].double(), "l2", TypeError, "codebook must have x's dtype"),
        (GOOD[0].long(), GOOD[1], "l2", TypeError, "x must be float32"),
        (GOOD[0], GOOD[1], "l1", ValueError, "metric must be one of l2, cosine, dot, got 'l1'"),
        (GOOD[0][None], GOOD[1], "l2", ValueError, r"codebook must have shape \[G, K, D\]"),
        (torch.zeros(3), GOOD[1], "l2", ValueError, r"x must have shape"),
        (GOOD[0].to("meta"), GOOD[1], "l2", ValueError, "codebook must be on x's device"),
    ],
)
def test_bad_input_is_named(x, codebook, metric, kind, message) -> None:
    with pytest.raises(kind, match=f"nearest_code: .*{message}"):
        ops.nearest_code(x, codebook, metric)
