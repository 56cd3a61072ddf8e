"""Hardware counters: the profiler's command, its raw page, the table; profiling needs a GPU."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import benchmarks.__main__ as command_line
from benchmarks import counters, ncu, report
from benchmarks.registry import Pass, Shape
from latent_rl.backends import OPS

STALL = ncu.STALL
COLUMNS = {
    "ID": "",
    "Process ID": "",
    "Kernel Name": "",
    "Block Size": "",
    "Grid Size": "",
    "Device": "",
    ncu.DURATION: "ns",
    ncu.READ: "byte",
    ncu.WRITTEN: "byte",
    ncu.DRAM: "%",
    ncu.MEMORY: "%",
    ncu.COMPUTE: "%",
    ncu.OCCUPANCY: "%",
    ncu.REGISTERS: "register/thread",
    STALL.format("long_scoreboard"): "inst",
    STALL.format("barrier"): "inst",
    STALL.format("selected"): "inst",
    # The same of some cycles once more.
    STALL.format("barrier_not_issued"): "inst",
}
QUANTIZE = (
    "void latent_rl::cuda::(anonymous namespace)::_quantize_finish_kernel<float, (int)4>(Args)"
)


def line(kernel: str, nanoseconds: str, read: str = "3000000", stalls: str = "6.0") -> list[str]:
    measured = [
        nanoseconds,
        read,
        "1,000,000",
        "70.5",
        "71",
        "12",
        "55.5",
        "40",
        stalls,
        "2",
        "1",
        "2",
    ]
    return ["0", "77", kernel, "(256, 1, 1)", "(132, 1, 1)", "0", *measured]


MARKER = line("at::cuda::(anonymous namespace)::spin_kernel(long)", "900")
LINES = [
    MARKER,
    line(QUANTIZE, "2,000"),
    line("_nearest_code_screen_kernel", "50000"),
    MARKER,
    line(QUANTIZE, "8000"),
    line("_nearest_code_screen_kernel", "9000"),
    line("_nearest_code_merge_kernel", "1000"),
]


def page(lines: list[list[str]]) -> str:
    rows = [list(COLUMNS), list(COLUMNS.values()), *lines]
    table = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    return f"==PROF== Connected to process 77\n==PROF== Disconnected\n{table}\n"


def test_a_raw_page_is_read() -> None:
    launch = ncu.parse(page([line(QUANTIZE, "2,000")]))[0]
    assert launch.kernel == "_quantize_finish_kernel"
    assert (launch.grid, launch.block, launch.registers) == ("(132, 1, 1)", "(256, 1, 1)", 40)
    assert launch.seconds == pytest.approx(2e-6)
    # Four million bytes in two microseconds.
    assert launch.bandwidth == pytest.approx(2e12)
    assert (launch.dram, launch.occupancy) == (pytest.approx(0.705), pytest.approx(0.555))
    # Issuing is no waiting.
    assert launch.main_stalls() == [("long_scoreboard", 0.75), ("barrier", 0.25)]


def test_units_are_those_of_the_page() -> None:
    text = page([line(QUANTIZE, "2")]).replace('"ns"', '"usecond"').replace('"byte"', '"Mbyte"')
    launch = ncu.parse(text.replace('"3000000"', '"3"').replace('"1,000,000"', '"1"'))[0]
    assert launch.seconds == pytest.approx(2e-6)
    assert launch.bandwidth == pytest.approx(2e12)


def test_a_missing_metric_is_no_zero() -> None:
    launch = ncu.parse(page([line(QUANTIZE, "2000")]).replace('"55.5"', '"n/a"'))[0]
    assert math.isnan(launch.occupancy)
    shown = ncu.markdown([ncu.Profiled("case", launch)], MACHINE)
    assert "| 71 % | 12 % | - | 40 |" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== no permission\n", "expected a raw page in CSV"),
        (page([line(QUANTIZE, "n/a")]), "has no gpu__time_duration.sum"),
    ],
)
def test_what_is_no_measurement_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ncu.parse(text)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (QUANTIZE, "_quantize_finish_kernel"),
        ("_nearest_code_screen_kernel", "_nearest_code_screen_kernel"),
        ("latent_rl::cuda::<unnamed>::_place_rows_kernel(long const*)", "_place_rows_kernel"),
        ("at::cuda::(anonymous namespace)::spin_kernel(long)", "spin_kernel"),
    ],
)
def test_names_are_shortened(name: str, short: str) -> None:
    assert ncu.short_name(name) == short


def test_markers_tell_the_cases_apart_and_the_slowest_come_first() -> None:
    found = ncu.by_case(ncu.parse(page(LINES)), ["small", "large"])
    assert [one.case for one in found] == ["small"] * 2 + ["large"] * 3
    assert [(one.case, one.launch.kernel) for one in ncu.slowest(found, 2)] == [
        ("small", "_nearest_code_screen_kernel"),
        ("large", "_quantize_finish_kernel"),
    ]


@pytest.mark.parametrize("cases", [["one"], ["one", "two", "three"]])
def test_kernels_of_unknown_cases_are_refused(cases: list[str]) -> None:
    with pytest.raises(ValueError, match=f"expected {len(cases)} markers"):
        ncu.by_case(ncu.parse(page(LINES)), cases)


MACHINE = {
    "device": "a made-up GPU",
    "driver": "1.2",
    "commit": "0123456789ab",
    "dirty": False,
    "ncu": "ncu 0",
}


def two_cases(ops: list[str] | None, device: str = "cuda") -> list[counters.Case]:
    shape = Shape({"N": 40, "D": 8, "K": 5})
    return [counters.Case("quantize", shape, which, "float32") for which in Pass]


def test_the_command_reads_a_page_and_writes_between_the_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "cases", two_cases)
    raw, target = tmp_path / "raw.csv", tmp_path / "performance.md"
    raw.write_text(page(LINES))
    start, end = report.MARKERS["counters"]
    target.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    arguments = ["counters", "--raw", str(raw), "--summary", str(target), "--out", str(tmp_path)]
    done = CliRunner().invoke(command_line.app, [*arguments, "--top", "1", "--label", "a GPU"])
    assert done.exit_code == 0, done.output
    text = target.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert (
        "| `_nearest_code_screen_kernel` | quantize forward, N=40 D=8 K=5, float32 | 50 |" in text
    )
    assert "_quantize_finish_kernel" not in text
    assert '"_nearest_code_merge_kernel"' in (tmp_path / "counters.json").read_text()


def test_the_clocks_are_left_alone() -> None:
    for line_ in (
        counters.command(["quantize"], Path("out.ncu-rep")),
        command_line.profile_target.__globals__["ncu_command"](
            command_line.Target("quantize", "40x8x5"), Path("out")
        ),
    ):
        assert line_[:2] == ["ncu", "--clock-control=none"]


def test_only_our_kernels_are_profiled() -> None:
    import re

    pattern = re.compile(counters.KERNELS.removeprefix("regex:"))
    folders = Path(counters.__file__).parents[1] / "kernels"
    sources = [p.read_text() for p in folders.rglob("*") if p.suffix in {".cu", ".cuh", ".py"}]
    names = {name for text in sources for name in re.findall(r"\b(_\w+_kernel)\b", text)}
    assert len(names) > 20
    assert all(pattern.search(name) for name in names)
    assert pattern.search("spin_kernel")
    for name in ("vectorized_elementwise_kernel", "cutlass_80_wmma", "triton_poi_fused_0"):
        assert not pattern.search(name)


def test_every_op_has_a_case_on_a_gpu() -> None:
    assert {case.op for case in counters.cases(None)} >= set(OPS)
    with pytest.raises(ValueError, match="ops: unknown 'nope'"):
        counters.cases(["nope"])


def test_what_the_profiler_starts_calls_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    entry = counters.entries()["quantize"]

    def make(inputs: object, which: Pass):
        return lambda: calls.append(which.value)

    monkeypatch.setattr(counters, "entries", lambda: {"quantize": entry_with(entry, make)})
    counters.inside(two_cases(None), torch.device("cpu"))
    times = counters.WARM_UP + 1
    assert calls == ["forward"] * times + ["forward+backward"] * times


def entry_with(entry, make):
    from dataclasses import replace

    return replace(entry, ours=make)


def test_without_the_program_the_command_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    done = CliRunner().invoke(command_line.app, ["counters", "--ops", "quantize"])
    assert done.exit_code == 2
    assert "ncu --clock-control=none" in done.output
    assert "ncu is not on the PATH" in done.output


def test_a_profiler_that_fails_is_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command, **options):
        return subprocess.CompletedProcess(command, 0, "==ERROR== ERR_NVGPUCTRPERM\n", "")

    monkeypatch.setattr(counters.shutil, "which", lambda name: name)
    monkeypatch.setattr(counters.subprocess, "run", run)
    done = CliRunner().invoke(command_line.app, ["counters", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "ERR_NVGPUCTRPERM" in done.output
