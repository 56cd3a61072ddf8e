"""The boundary between Python and C++: errors instead of crashes, threads, forks, forced paths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latent_rl import _C
from latent_rl.native.nearest_code import nearest_code
from latent_rl.native.sample_codes import sample_codes, sample_codes_cuda


def call_nearest(**changes: int) -> None:
    x = torch.zeros(4, 8)
    codes, distance = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    arguments = {
        "dtype": 0,
        "metric": 0,
        "x": x.data_ptr(),
        "codebook": x.data_ptr(),
        "codes": codes.data_ptr(),
        "distance": distance.data_ptr(),
        "groups": 1,
        "rows": 4,
        "num_codes": 4,
        "dim": 8,
        "x_group_stride": 32,
        "x_row_stride": 8,
        "counters": 0,
        "threads": 1,
    }
    _C.nearest_code(*{**arguments, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 0}, "nearest_code: x is a null pointer but 32 elements are wanted of it"),
        ({"codes": 12}, "nearest_code: codes is not aligned to its 8-byte elements"),
        ({"rows": -1}, "nearest_code: rows must be at least 0, got -1"),
        ({"num_codes": 0}, "nearest_code: num_codes must be at least 1, got 0"),
        ({"dim": 0}, "nearest_code: dim must be at least 1, got 0"),
        ({"x_row_stride": 7}, "the row stride of x must be at least its width"),
        ({"metric": 3}, "nearest_code: metric must be 0"),
        ({"threads": 0}, "nearest_code: threads must be at least 1, got 0"),
    ],
)
def test_wrong_values_raise(changes: dict[str, int], message: str) -> None:
    call_nearest()
    with pytest.raises(ValueError, match=message):
        call_nearest(**changes)


def test_a_wrong_dtype_code_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="got dtype code 9"):
        call_nearest(dtype=9)


def test_a_dtype_no_op_takes_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="nearest_code: dtype must be float32"):
        nearest_code(torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 3), "l2")


def test_null_pointers_are_legal_for_nothing() -> None:
    call_nearest(rows=0, x=0, codes=0, distance=0)


def test_a_negative_temperature_raises() -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="temperature must not be negative"):
        sample_codes(torch.zeros(1, 4), -1.0, 0, 1.0, 0.0, ids, ids)


def test_cuda_without_a_build_or_with_too_many_codes_raises() -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    expected = ValueError if _C.has_cuda else RuntimeError
    with pytest.raises(expected, match="sample_codes"):
        sample_codes_cuda(torch.zeros(1, 9000), 1.0, 0, 1.0, 0.0, ids, ids)


def isa_of_new_process(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from latent_rl import _C; print(_C.isa())"],
        env={**os.environ, "LATENT_RL_ISA": name},
        cwd=Path(sys.prefix),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_forces_an_instruction_set(every_isa: list[str]) -> None:
    for name in every_isa:
        assert isa_of_new_process(name).stdout.strip() == name


def test_an_unknown_instruction_set_is_refused() -> None:
    done = isa_of_new_process("sse9")
    assert done.returncode != 0
    assert "must be baseline, avx2, avx512 or avx512bf16" in done.stderr


FORK = """
import os, torch
from latent_rl.native.nearest_code import nearest_code
torch.set_num_threads(2)
x, c = torch.randn(1, 4000, 64), torch.randn(1, 64, 64)
codes = nearest_code(x, c, "l2")[0]
child = os.fork()
if child == 0:
    same = torch.equal(codes, nearest_code(x, c, "l2")[0])
    os._exit(0 if same else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_starts_with_threads_of_its_own() -> None:
    # In its own process: a child of the test runner would inherit whatever threads it has.
    done = subprocess.run([sys.executable, "-c", FORK], timeout=120, check=False)
    assert done.returncode == 0


def test_calls_from_several_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3000, 48, generator=generator)
    codebook = torch.randn(1, 64, 48, generator=generator)
    torch.set_num_threads(2)
    expected = nearest_code(x, codebook, "l2")[0]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: nearest_code(x, codebook, "l2")[0], range(12)))
    assert all(torch.equal(expected, got) for got in results)
