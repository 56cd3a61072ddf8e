"""The timeline of an RL iteration: ranges, the trace's arithmetic, and one recorded here."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import benchmarks.__main__ as command_line
from benchmarks import report, trace


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> Any:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def annotated(name: str, ts: float, dur: float) -> Any:
    return event("user_annotation", name, ts, dur)


# Microseconds. The kernel of the reward runs while the update is already going on.
EVENTS = [
    {"ph": "M", "name": "process_name"},
    annotated("latent_rl::iteration", 0, 10_000),
    annotated("latent_rl::update", 100, 8_000),
    annotated("latent_rl::rollout", 200, 5_000),
    annotated("latent_rl::decode", 300, 3_000),
    annotated("latent_rl::prefill", 400, 1_000),
    annotated("latent_rl::reward", 4_000, 500),
    annotated("Optimizer.step#AdamW.step", 9_000, 700),
    annotated("## Call CompiledFxGraph ##", 500, 100),
    event("cpu_op", "latent_rl::sample_codes", 2_000, 40),
    event("cpu_op", "latent_rl::sample_codes", 2_500, 60),
    event("cpu_op", "latent_rl::code_logprobs_backward", 6_000, 30),
    event("cpu_op", "latent_rl::sample_codes", 20_000, 60),
    event("cpu_op", "aten::mm", 2_100, 10),
    event("cuda_runtime", "cudaLaunchKernel", 450, 5, 1),
    event("cuda_driver", "cuLaunchKernelEx", 4_100, 5, 2),
    event("cuda_runtime", "cudaGraphLaunch", 2_200, 5, 3),
    event("kernel", "prefill_kernel", 500, 200, 1),
    event("kernel", "late_kernel", 5_900, 300, 2),
    event("kernel", "in_a_graph", 2_300, 50, 3),
    event("kernel", "in_a_graph_too", 2_350, 50, 3),
    event("gpu_memcpy", "Memcpy HtoD", 9_100, 10, 99),
    event("gpu_user_annotation", "latent_rl::update", 100, 8_000),
]


def test_a_phase_counts_without_the_phases_in_it() -> None:
    rows = {row.name: row for row in trace.rows_of(trace.parse(EVENTS))}
    assert {name: row.host_ms for name, row in rows.items()} == pytest.approx(
        {
            "prefill": 1.0,
            "decode": 2.0,
            "reward": 0.5,
            "rollout": 1.5,
            "update": 3.0 + 0.7,
            "iteration": 1.3,
        }
    )
    assert sum(row.host_ms for row in rows.values()) == pytest.approx(10.0)


def test_the_device_s_work_belongs_to_who_launched_it() -> None:
    rows = {row.name: row.device_ms for row in trace.rows_of(trace.parse(EVENTS))}
    assert rows == pytest.approx(
        {
            "prefill": 0.2,
            "decode": 0.1,
            "reward": 0.3,
            "rollout": 0.0,
            # A copy whose launch is not on record.
            "update": 0.01,
            "iteration": 0.0,
        }
    )


def test_ops_are_counted_where_they_are_called() -> None:
    rows = {row.name: row.ops for row in trace.rows_of(trace.parse(EVENTS))}
    assert rows["decode"] == {"sample_codes": (2, pytest.approx(0.1))}
    assert rows["update"] == {"code_logprobs_backward": (1, pytest.approx(0.03))}


def test_without_a_device_nothing_is_claimed_of_one() -> None:
    host = [one for one in EVENTS if one.get("cat") not in ("kernel", "gpu_memcpy")]
    rows = trace.rows_of(trace.parse(host))
    assert all(row.device_ms is None for row in rows)
    machine = {"device": "a CPU", "commit": "0123", "dirty": True}
    lines = trace.markdown(rows, machine, "One iteration").splitlines()
    assert lines[0].startswith("One iteration on a CPU, commit 0123-dirty;")
    assert "| decode | 2.00 | 20 % | - | sample_codes 2, 0.10 |" in lines
    assert lines[-1] == "| together | 10.00 | 100 % | - | |"


@pytest.mark.parametrize("events", [[], [EVENTS[1], EVENTS[1]]])
def test_a_trace_without_one_iteration_is_refused(events: list[Any]) -> None:
    with pytest.raises(ValueError, match="expected one range latent_rl::iteration"):
        trace.parse(events)


def test_plain_and_compressed_traces_are_read(tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": EVENTS})
    plain, packed = tmp_path / "t.json", tmp_path / "t.json.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert trace.read(plain) == trace.read(packed)


def test_a_picture_has_every_lane(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "t.png"
    assert trace.draw(trace.parse(EVENTS), picture) is None
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_an_iteration_recorded_here(tmp_path: Path) -> None:
    target = tmp_path / "performance.md"
    target.write_text("\n".join(report.MARKERS["timeline"]) + "\n")
    arguments = ["timeline", "--prompts", "2", "--steps", "4", "--out", str(tmp_path)]
    done = CliRunner().invoke(command_line.app, [*arguments, "--summary", str(target)])
    assert done.exit_code == 0, done.output
    found = trace.read(tmp_path / "rl-iteration-cpu.json.gz")
    rows = {row.name: row for row in trace.rows_of(found)}
    assert set(rows) == set(trace.SHOWN)
    assert all(row.host_ms > 0 for row in rows.values())
    # Both prompts are read in one batch; sixteen completions then say four tokens each.
    assert sum(span.name == "prefill" for span in found.phases) == 1
    assert rows["decode"].ops["sample_codes"][0] >= 4
    assert "code_logprobs_backward" in rows["update"].ops
    assert "| decode |" in target.read_text()
