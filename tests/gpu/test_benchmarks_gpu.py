"""The benchmarks on a device: events, a cold cache, captured calls."""

from __future__ import annotations

import json
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


def test_the_engine_s_tail_is_a_graph_and_its_peers_launch_as_users_do(tmp_path: Path) -> None:
    path = tmp_path / "tail.json"
    arguments = ["run", "--device", "cuda", "--ops", "decode_tail", "--dtype", "bfloat16"]
    arguments += ["--shapes", "8x256x512x4096x64x2x0,8x256x512x4096x64x2x1", "--quick"]
    done = CliRunner().invoke(command_line.app, [*arguments, "--output", str(path)])
    assert done.exit_code == 0, done.output
    for row in results.load(path)["rows"]:
        statuses = {name: found["status"] for name, found in row["contestants"].items()}
        assert set(statuses.values()) == {"measured"}, row["contestants"]
        assert not any("remark" in found for found in row["contestants"].values())


def test_every_kernel_of_an_op_is_a_contestant_and_has_an_order(tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    arguments = ["order", "--device", "cuda", "--ops", "gated_merge"]
    arguments += ["--shapes", "64x2048x11008x128", "--output", str(path)]
    done = CliRunner().invoke(command_line.app, arguments)
    assert done.exit_code == 0, done.output
    assert "gated_merge: " in done.output
    names = {name for row in results.load(path)["rows"] for name in row["contestants"]}
    assert {"latent_rl", "latent_rl (cuda)", "latent_rl (triton)"} <= names


@pytest.mark.parametrize("op", ["nearest_code", "gated_merge", "slot_attention"])
def test_a_short_sweep_finds_configurations_that_are_right(op: str, tmp_path: Path) -> None:
    sizes = {
        "nearest_code": "4096x256x512",
        "gated_merge": "64x1024x2816x64",
        "slot_attention": "8x8x512x16x2x128",
    }
    path = tmp_path / "tuned.json"
    arguments = ["tune", op, "--device", "cuda", "--shapes", sizes[op], "--dtype", "bfloat16"]
    arguments += ["--limit", "4", "--workers", "4", "--budget-s", "90", "--output", str(path)]
    done = CliRunner().invoke(command_line.app, arguments)
    assert done.exit_code == 0, done.output
    (point,) = json.loads(path.read_text())["points"]
    timed = [found for found in point["candidates"] if found["timing"]]
    assert timed, done.output
    assert point["candidates"][0]["timing"], "the table's own choice must run"
    assert all(found["tried"]["registers"] > 0 for found in timed)
