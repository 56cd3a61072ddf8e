"""A run against a baseline that is made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import benchmarks.__main__ as command_line
from benchmarks import results, verify
from benchmarks.verify import OpTestsError, RefusedError, compare


class TestCompare:
    def test_as_fast_as_before(self, make_data) -> None:
        (verdict,) = compare(make_data(ours=50.0, gemm=40.0), make_data(ours=51.0, gemm=40.0))
        assert not verdict.slower
        assert verdict.ratio == pytest.approx(1.02)
        assert verdict.tolerance == verify.LEAST_TOLERANCE

    def test_slower(self, make_data) -> None:
        (verdict,) = compare(make_data(ours=50.0, gemm=40.0), make_data(ours=54.0, gemm=40.0))
        assert verdict.slower
        assert str(verdict).startswith("SLOWER: nearest_code forward")

    def test_a_slow_day_of_the_machine_is_no_regression(self, make_data) -> None:
        (verdict,) = compare(make_data(ours=50.0, gemm=40.0), make_data(ours=100.0, gemm=80.0))
        assert verdict.ratio == pytest.approx(1.0)

    def test_the_tolerance_is_the_spread_of_both(self, make_data) -> None:
        noisy = [50.0, 50.0, 50.0, 55.0, 55.0]
        (verdict,) = compare(make_data(ours=noisy, gemm=40.0), make_data(ours=noisy, gemm=40.0))
        assert verdict.tolerance == pytest.approx(2 * 5 / 50)

    def test_without_a_unit_a_row_is_slow_if_its_time_and_its_share_are(self, make_data) -> None:
        before, after = make_data(ours=50.0), make_data(ours=60.0)
        assert compare(before, after)[0].ratio == pytest.approx(1.2)
        after["rows"][0]["roof_ms"] *= 1.2  # the whole machine is slower today
        assert compare(before, after)[0].ratio == pytest.approx(1.0)
        same = make_data(ours=50.0)
        same["rows"][0]["roof_ms"] /= 1.2  # only the copy was faster
        assert compare(before, same)[0].ratio == pytest.approx(1.0)

    def test_an_op_that_no_longer_runs_is_slower(self, make_data) -> None:
        (verdict,) = compare(make_data(ours=50.0, gemm=40.0), make_data(ours="no", gemm=40.0))
        assert verdict.slower

    def test_other_machines_are_refused(self, make_data, machine) -> None:
        other = make_data(replace(machine, device="another CPU"), ours=50.0)
        with pytest.raises(RefusedError, match="'a made-up CPU' against 'another CPU'"):
            compare(make_data(ours=50.0), other)

    def test_nothing_in_common_is_refused(self, make_data) -> None:
        fresh = make_data(ours=50.0)
        fresh["rows"][0]["threads"] = 4
        with pytest.raises(RefusedError, match="no row in common"):
            compare(make_data(ours=50.0), fresh)


class TestBaseline:
    def test_the_newest_clean_one_of_this_machine(
        self, tmp_path: Path, make_data, machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, change in {
            "old": {"commit": "old"},
            "new": {"commit": "new"},
            "dirty": {"commit": "newest", "dirty": True},
            "other": {"commit": "newest", "device": "another CPU"},
        }.items():
            data = make_data(replace(machine, **change), ours=50.0)
            (tmp_path / f"{name}.json").write_text(json.dumps(data))
        (tmp_path / "form.json").write_text('{"rows": []}')
        ages = {"old": 1, "new": 2, "newest": 3}
        monkeypatch.setattr(verify, "_age", ages.__getitem__)
        assert verify.newest_baseline(machine, tmp_path).name == "new.json"

    def test_none_names_the_machines_there_are(self, tmp_path: Path, make_data, machine) -> None:
        (tmp_path / "a.json").write_text(json.dumps(make_data(ours=50.0)))
        mine = replace(machine, cores=64)
        with pytest.raises(RefusedError, match="there are results of a made-up CPU"):
            verify.newest_baseline(mine, tmp_path)


class TestOpTests:
    def entry(self, monkeypatch: pytest.MonkeyPatch, tests: Path) -> None:
        entry = replace(verify.entries()["nearest_code"], tests=str(tests))
        monkeypatch.setattr(verify, "entries", lambda: {"nearest_code": entry})

    def test_failing_tests_are_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "test_broken.py"
        path.write_text("def test_it():\n    assert 1 == 2\n")
        self.entry(monkeypatch, path)
        with pytest.raises(OpTestsError, match=r"nearest_code: .* so its timings mean nothing"):
            verify.check_tests("nearest_code")

    def test_passing_tests_are_silent(self, tmp_path: Path, monkeypatch) -> None:
        path = tmp_path / "test_fine.py"
        path.write_text("def test_it():\n    pass\n")
        self.entry(monkeypatch, path)
        verify.check_tests("nearest_code")


class TestExitCodes:
    @pytest.fixture
    def files(self, tmp_path: Path, make_data, machine, monkeypatch):
        monkeypatch.setattr(command_line, "describe", lambda device, label: machine)
        monkeypatch.setattr(verify, "check_tests", lambda op: None)
        contents = {
            "base": make_data(ours=50.0, gemm=40.0),
            "same": make_data(ours=50.0, gemm=40.0),
            "slow": make_data(ours=90.0, gemm=40.0),
            "other": make_data(replace(machine, cores=64), ours=50.0),
        }
        for name, data in contents.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(data))
        return tmp_path

    def verify(self, files: Path, baseline: str, fresh: str):
        arguments = ["verify", "--baseline", str(files / f"{baseline}.json")]
        arguments += ["--fresh", str(files / f"{fresh}.json")]
        return CliRunner().invoke(command_line.app, arguments)

    @pytest.mark.parametrize(
        ("baseline", "fresh", "code"),
        [("base", "same", 0), ("base", "slow", 1), ("other", "same", 2), ("base", "missing", 2)],
    )
    def test_codes(self, baseline: str, fresh: str, code: int, files: Path) -> None:
        assert self.verify(files, baseline, fresh).exit_code == code

    def test_failing_tests_come_first(self, files: Path, monkeypatch) -> None:
        def fail(op: str) -> None:
            raise OpTestsError(f"{op}: its tests fail")

        monkeypatch.setattr(verify, "check_tests", fail)
        done = self.verify(files, "base", "slow")
        assert done.exit_code == 3
        assert "nearest_code: its tests fail" in done.output

    def test_it_measures_ours_and_the_unit_alone(self, files: Path, monkeypatch) -> None:
        seen = {}

        def run(options, path, say, plan):
            seen["peers"], seen["plan"] = options.peers, [point.key for point in plan]
            return type("Done", (), {"data": results.load(files / "same.json")})

        monkeypatch.setattr(command_line, "run_points", run)
        arguments = ["verify", "--baseline", str(files / "base.json")]
        assert CliRunner().invoke(command_line.app, arguments).exit_code == 0
        key = ("nearest_code", "N=8192 D=2048 K=128", "forward", "float32", 1)
        assert seen == {"peers": [], "plan": [key]}

    def test_ops_that_the_baseline_lacks_are_refused(self, files: Path) -> None:
        arguments = ["verify", "--baseline", str(files / "base.json"), "--ops", "quantize"]
        done = CliRunner().invoke(command_line.app, arguments)
        assert done.exit_code == 2
        assert "the baseline holds no row of ['quantize']" in done.output
