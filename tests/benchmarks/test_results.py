"""Rows, goals, result files and what they print."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from benchmarks import report, results, roofline
from benchmarks.registry import Goal, entries
from benchmarks.results import Results, judged, key_of, load

MARKERS = report.MARKERS["cpu"]


class TestRow:
    def test_rates_and_ratios(self, make_row) -> None:
        row = make_row(ours=50.0, gemm=40.0, mm=100.0)
        assert row["speedup"] == {"GEMM32": 0.8, "mm+argmin": 2.0}
        assert row["relative_to_unit"] == pytest.approx(
            {"latent_rl": 1.25, "GEMM32": 1.0, "mm+argmin": 2.5}
        )
        flops = 2 * 8192 * 2048 * 128
        assert row["gflop_per_s"] == pytest.approx(flops / 0.050 / 1e9)
        # 100 GFLOP/s of product is the nearer roof; 20 GB/s of copy would take 3.4 ms.
        assert row["roof_ms"] == pytest.approx(1e3 * flops / 100e9)
        assert row["roof_share"] == pytest.approx(row["roof_ms"] / 50.0)

    def test_ratios_are_of_25th_percentiles(self, make_row) -> None:
        row = make_row(ours=[10.0, 10.0, 90.0, 90.0, 90.0], mm=[20.0, 20.0, 20.0, 20.0, 20.0])
        assert row["speedup"]["mm+argmin"] == 2.0

    def test_failed_and_absent_are_stated(self, make_row) -> None:
        row = make_row(ours=50.0, gemm=40.0, mm="OutOfMemoryError: 32 GiB")
        assert row["contestants"]["mm+argmin"] == {
            "status": "failed",
            "reason": "OutOfMemoryError: 32 GiB",
        }
        assert row["contestants"]["FAISS GPU"]["status"] == "absent"
        assert "mm+argmin" not in row["speedup"]

    def test_ours_can_fail_too(self, make_row) -> None:
        row = make_row(ours="ValueError: no", gemm=40.0)
        assert "speedup" not in row
        assert all(goal["met"] is None for goal in row["goals"])

    def test_goals_of_the_first_shape(self, make_row) -> None:
        reached = make_row(ours=43.0, gemm=40.0, mm=100.0)["goals"]
        assert [goal["met"] for goal in reached] == [True, False, True]
        assert reached[0]["goal"] == "<= 1.1 GEMM32"
        assert reached[0]["value"] == pytest.approx(43 / 40)
        missed = make_row(ours=45.0, gemm=40.0, mm=44.0)["goals"]
        assert [goal["met"] for goal in missed] == [False, False, False]

    def test_ahead_of_every_peer_means_of_the_fastest(self, make_row) -> None:
        row = make_row(ours=50.0, gemm=40.0, mm=100.0, cdist=49.0)
        assert judged(Goal(1.0, "every peer"), row)["met"] is False

    @pytest.mark.parametrize(
        ("goal", "met"),
        [
            (Goal(at_most_us=50_000), True),
            (Goal(at_most_us=49_000), False),
            (Goal(2.0, "mm+argmin"), True),
            (Goal(2.1, "mm+argmin"), False),
            (Goal(2.0, "flash-kmeans"), None),
        ],
    )
    def test_goals(self, goal: Goal, met: bool | None, make_row) -> None:
        assert judged(goal, make_row(ours=50.0, gemm=40.0, mm=100.0))["met"] is met


class TestFile:
    def test_what_is_saved_is_loaded(self, tmp_path, machine, make_row) -> None:
        done = Results(tmp_path / "r.json", machine)
        done.add(make_row(ours=50.0, gemm=40.0))
        data = load(done.path)
        assert data["schema"] == results.SCHEMA
        assert {"device", "cores", "driver", "clocks", "commit", "dirty", "packages"} <= set(
            data["machine"]
        )
        (row,) = data["rows"]
        assert key_of(row) == (
            "nearest_code",
            "N=8192 D=2048 K=128",
            "forward",
            "float32",
            1,
        )
        assert set(row["contestants"]["latent_rl"]["timing"]) == {
            "median_ms",
            "p20_ms",
            "p25_ms",
            "p80_ms",
            "samples",
        }

    def test_a_run_resumes(self, tmp_path, machine, make_row, point) -> None:
        path = tmp_path / "r.json"
        Results(path, machine).add(make_row(ours=50.0))
        again = Results(path, machine)
        assert not again.holds(point)
        assert again.resume() == 1
        assert again.holds(point)
        assert not again.holds(replace(point, threads=2))

    @pytest.mark.parametrize(
        "change", [{"commit": "fffffffffff0"}, {"dirty": True}, {"device": "another"}]
    )
    def test_but_not_from_other_code_or_machines(
        self, change, tmp_path, machine, make_row, point
    ) -> None:
        path = tmp_path / "r.json"
        Results(path, machine).add(make_row(ours=50.0))
        assert Results(path, replace(machine, **change)).resume() == 0

    def test_nor_from_a_tree_that_was_dirty(self, tmp_path, machine, make_row) -> None:
        path = tmp_path / "r.json"
        Results(path, replace(machine, dirty=True)).add(make_row(ours=50.0))
        assert Results(path, machine).resume() == 0

    def test_other_forms_are_refused(self, tmp_path) -> None:
        path = tmp_path / "old.json"
        path.write_text(json.dumps({"machine": {}, "rows": []}))
        with pytest.raises(ValueError, match=r"schema must be 2, got None"):
            load(path)

    def test_committed_results_can_be_read(self) -> None:
        for path in results.FOLDER.glob("*.json"):
            if "schema" not in json.loads(path.read_text()):
                continue  # written before results had a form that is kept
            data = load(path)
            assert data["rows"], path
            assert len({key_of(row) for row in data["rows"]}) == len(data["rows"])


class TestReport:
    def test_the_table_says_everything(self, make_data) -> None:
        from rich.console import Console

        data = make_data(ours=50.0, gemm=40.0, mm=100.0, cdist="RuntimeError: no")
        console = Console(width=220, record=True, file=io.StringIO())
        console.print(report.table_of(data["rows"], data["machine"]))
        text = console.export_text()
        for expected in (
            "a made-up CPU",
            "N=8192 D=2048 K=128",
            "mm+argmin 2.00x",
            "cdist failed: RuntimeError: no",
            "<= 1.1 GEMM32: missed (1.25)",
        ):
            assert expected in text
        assert report.absences(data["rows"]) == ["FAISS GPU (nearest_code): runs on cuda only"]

    def test_markdown_sets_threads_side_by_side(self, make_data, make_row) -> None:
        data = make_data(ours=50.0, gemm=40.0, mm=100.0)
        data["rows"].append({**make_row(ours=30.0, gemm=20.0, mm=45.0), "threads": 2})
        text = report.markdown(data, "plot.png")
        assert "| 50 / 30 | GEMM32 0.80 / 0.67; mm+argmin 2.00 / 1.50 | <= 1.1 GEMM32: " in text
        assert "<= 1.1 GEMM32: missed / missed; <= 0.8 GEMM32: missed / missed; " in text
        assert "Absent: FAISS GPU (nearest_code): runs on cuda only." in text
        assert "![Measured roofline](plot.png)" in text

    def test_wrong_codes_have_a_table(self, make_data) -> None:
        data = make_data(ours=50.0, mm=100.0)
        found = data["rows"][0]["contestants"]
        found["latent_rl"]["quality"] = {"wrong_share": 0.0, "reranked_share": 0.031}
        found["mm+argmin"]["quality"] = {"wrong_share": 0.0066, "hard_wrong_share": 0.18}
        text = report.markdown(data)
        assert "latent_rl 0 % wrong, 3.1 % re-ranked; mm+argmin 0.66 % wrong (18 % offset)" in text

    def test_a_floor_is_the_roof_of_the_row(self, make_row) -> None:
        row = make_row(ours=50.0, gemm=40.0)
        row["roof_ms"] = 25.0
        assert results.judged(Goal(at_most_floor=2.1), row) == {
            "goal": "<= 2.1x floor",
            "value": 2.0,
            "met": True,
        }
        assert results.judged(Goal(at_most_floor=1.9), row)["met"] is False

    def test_rows_of_our_own_table_are_no_peers(self, make_row) -> None:
        row = make_row(**{"ours": 50.0, "gemm": 40.0, "mm": 60.0, "latent_rl (reference)": 5.0})
        assert results.judged(Goal(1.0, "every peer"), row)["value"] == 60.0 / 50.0

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_only_what_is_between_the_markers_changes(self, device: str, tmp_path) -> None:
        path = tmp_path / "README.md"
        start, end = report.MARKERS[device]
        other = "\n".join(report.MARKERS["cpu" if device == "cuda" else "cuda"])
        path.write_text(f"{other}\n{start}\nold\n{end}\nafter\n")
        report.write_between(path, "new", device)
        report.write_between(path, "newer", device)
        assert path.read_text() == f"{other}\n{start}\nnewer\n{end}\nafter\n"

    @pytest.mark.parametrize("text", ["", MARKERS[0], "\n".join(reversed(MARKERS))])
    def test_a_file_without_markers_is_refused(self, text: str, tmp_path) -> None:
        path = tmp_path / "README.md"
        path.write_text(text)
        with pytest.raises(ValueError, match="expected the lines"):
            report.write_between(path, "new", "cpu")
        assert path.read_text() == text

    def test_every_op_has_a_colour(self) -> None:
        assert len(set(roofline.COLOURS)) == len(roofline.COLOURS) >= len(entries())

    def test_the_roofline_is_drawn(self, make_data, tmp_path) -> None:
        path = tmp_path / "roof.png"
        assert roofline.draw(make_data(ours=50.0, gemm=40.0), path) is None
        assert path.read_bytes().startswith(b"\x89PNG")
        failed = make_data(ours="ValueError: no")
        assert roofline.draw(failed, tmp_path / "none.png") == "no row was measured"
