"""The command line as a whole: entry point, errors, doctor, bench and demo's checks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import latent_rl
from latent_rl import backends
from latent_rl.cli import main, run
from latent_rl.cli.errors import UserError, exit_code, one_line


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


class TestEntryPoint:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["--version"]) == 0
        assert capsys.readouterr().out.strip() == f"latent-rl {latent_rl.__version__}"

    def test_help_lists_the_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["--help"]) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in ("demo", "train", "generate", "doctor", "bench"))

    def test_help_loads_nothing_heavy(self) -> None:
        result = python(
            "import sys\n"
            "from latent_rl.cli import run\n"
            "assert run(['train', '--help']) == 0\n"
            "print([m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
        )
        assert result.stdout.splitlines()[-1] == "[]", result.stderr

    def test_module_and_script_name_the_same_function(self) -> None:
        (script,) = importlib.metadata.entry_points(group="console_scripts", name="latent-rl")
        assert script.load() is main

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["frobnicate"], "No such command 'frobnicate'"),
            (["train"], "Missing argument 'recipe'"),
            (["train", "absent.yaml"], "absent.yaml: no such recipe"),
            (["train", "x.yaml", "--outt", "y"], "No such option: --outt"),
            (["demo", "--task", "chess"], "'chess' is not one of"),
            (["demo", "--algorithm", "ppoo"], "unknown algorithm 'ppoo'"),
            # Known to the trainer, but the demo's other arm is TRL's GRPOTrainer.
            (["demo", "--algorithm", "ppo"], "unknown algorithm 'ppo'; both arms"),
            (["demo", "--scale", "0"], "--scale must be > 0"),
        ],
    )
    def test_misuse_is_one_line(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert run(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not list(tmp_path.iterdir())

    def test_demo_names_the_packages_it_misses(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "trl" else find_spec(name)
        )
        assert run(["demo", "--out", str(tmp_path / "out")]) == 2
        assert "demo: needs trl; install with" in capsys.readouterr().err

    def test_demo_refuses_a_file_as_its_directory(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").write_text("mine", encoding="utf-8")
        assert run(["demo", "--out", str(tmp_path / "out")]) == 2
        assert "is not a directory" in capsys.readouterr().err
        assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


class TestErrors:
    @pytest.mark.parametrize("error", [UserError("why"), ValueError("why"), ImportError("why")])
    def test_user_errors_have_no_traceback(
        self, error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("LATENT_RL_TRACEBACK", raising=False)
        assert exit_code(error) == 2
        assert capsys.readouterr().err == "latent-rl: why\n"

    def test_the_traceback_can_be_asked_for(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LATENT_RL_TRACEBACK", "1")
        assert exit_code(ValueError("why")) == 2
        assert "ValueError: why" in capsys.readouterr().err

    def test_a_defect_keeps_its_traceback(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert exit_code(ZeroDivisionError("ours")) == 1
        assert "ZeroDivisionError: ours" in capsys.readouterr().err

    def test_a_file_error_names_the_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert exit_code(FileNotFoundError(2, "No such file or directory", "a.png")) == 2
        assert capsys.readouterr().err == "latent-rl: a.png: No such file or directory\n"

    def test_long_messages_are_folded_and_cut(self) -> None:
        assert one_line("a\n  b\tc") == "a b c"
        assert len(one_line("x" * 5000)) == 600


class TestDoctor:
    def test_every_op_is_served_and_every_other_row_has_a_reason(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("LATENT_RL_BACKEND", raising=False)
        assert run(["doctor", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["latent_rl"] == latent_rl.__version__
        cpu = {entry["op"]: entry for entry in found["ops"] if entry["device"] == "cpu"}
        assert set(cpu) == set(backends.OPS)
        for op, entry in cpu.items():
            rows = {name for name, _ in backends.explain(op)}
            assert entry["served_by"] in rows
            assert set(entry["why_not"]) == rows - {entry["served_by"]}
            assert all(entry["why_not"].values())

    def test_a_forced_backend_that_cannot_run_is_shown_not_raised(self) -> None:
        result = python(
            "from latent_rl.cli import run; raise SystemExit(run(['doctor', '--json']))",
            LATENT_RL_BACKEND="sample_codes=cuda",
            CUDA_VISIBLE_DEVICES="",
        )
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        entry = next(e for e in found["ops"] if e["op"] == "sample_codes")
        assert entry["served_by"] is None
        assert "forces cuda" in entry["problem"]

    def test_the_table_names_versions_and_ops(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["doctor"]) == 0
        out = capsys.readouterr().out
        assert importlib.metadata.version("torch") in out
        assert "extension latent_rl._C: built with" in out
        assert all(op in out for op in backends.OPS)


class TestBench:
    def test_hands_over_to_the_benchmarks(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["bench", "run", "--ops", "nope"]) == 2
        assert "unknown ['nope']" in capsys.readouterr().err

    def test_outside_a_checkout_it_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(latent_rl, "__file__", str(tmp_path / "latent_rl" / "__init__.py"))
        assert run(["bench", "run"]) == 2
        assert "not part of an installed package" in capsys.readouterr().err
