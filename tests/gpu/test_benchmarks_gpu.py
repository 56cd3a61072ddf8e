"""The benchmarks on a device: events, a cold cache, captured calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import benchmarks.__main__ as command_line
from benchmarks import results, timing

pytestmark = pytest.mark.gpu


def test_a_small_run(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    arguments = ["run", "--device", "cuda", "--ops", "sample_codes", "--shapes", "4x64"]
    arguments += ["--dtype", "float32,bfloat16", "--rounds", "5", "--output", str(path)]
    arguments += ["--peers", "topk + softmax + multinomial"]
    done = CliRunner().invoke(command_line.app, arguments)
    assert done.exit_code == 0, done.output
    data = results.load(path)
    assert data["machine"]["driver"]
    assert data["machine"]["clocks"]
    assert data["ceilings"]["1"]["clocks"]
    for row in data["rows"]:
        ours = row["contestants"]["latent_rl"]
        assert ours["remark"] == "CUDA graph"
        assert row["contestants"]["topk + softmax + multinomial"]["status"] == "measured"


def test_a_captured_call_is_replayed(cuda: torch.device) -> None:
    count = torch.zeros((), device=cuda)
    replay, remark = timing.captured(lambda: count.add_(1), cuda)
    assert remark == "CUDA graph"
    before = float(count)
    replay()
    assert float(count) == before + 1


def test_a_call_that_cannot_be_captured_is_called(cuda: torch.device) -> None:
    value = torch.ones((), device=cuda)
    call, remark = timing.captured(lambda: value.item(), cuda)
    assert remark.startswith("not captured: ")
    assert call() == 1.0


def test_the_clock_sees_the_work_and_flushes_the_cache(cuda: torch.device) -> None:
    # 32 MiB stay in the L2 of every supported device that has one this large, unless it is flushed.
    data = torch.ones(8 * 2**20, device=cuda)
    clock = timing.event_clock(cuda)
    one = min(clock(lambda: data.sum()) for _ in range(10))
    four = min(clock(lambda: [data.sum() for _ in range(4)]) for _ in range(10))
    assert 0 < one < four
