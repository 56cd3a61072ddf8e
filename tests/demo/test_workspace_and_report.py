"""Resuming, and what a run shows at its end."""

import dataclasses
import io
import json
import re

import pytest
from PIL import Image
from rich.console import Console

from latent_rl.demo import ArmResult, DemoResult, DemoSettings, report
from latent_rl.demo.progress import DemoProgress
from latent_rl.demo.result import Sample, WorldModelNumbers, result_from_json
from latent_rl.demo.workspace import Workspace
from latent_rl.eval import Interval
from latent_rl.eval.rows import thumbnail

# settings


@pytest.mark.parametrize(
    ("field", "value"),
    [("task", "chess"), ("algorithm", "sarsa"), ("scale", 0.0), ("scale", float("nan"))],
)
def test_settings_name_what_is_wrong(field, value) -> None:
    with pytest.raises(ValueError, match=f"{field} must"):
        DemoSettings(**{field: value})


def test_the_fingerprint_ignores_where_and_whether_to_resume(tmp_path) -> None:
    base = DemoSettings()
    assert DemoSettings(out=tmp_path, resume=False).fingerprint() == base.fingerprint()
    assert DemoSettings(seed=1).fingerprint() != base.fingerprint()


# workspace


def test_finished_steps_survive_and_unfinished_do_not(tmp_path) -> None:
    settings = DemoSettings(out=tmp_path / "run")
    Workspace(settings).finish("corpora", {"seconds": 2.5})
    again = Workspace(settings)
    assert again.is_done("corpora")
    assert not again.is_done("base model")
    assert again.seconds() == {"corpora": 2.5}


def test_runs_of_other_settings_are_not_mixed(tmp_path) -> None:
    Workspace(DemoSettings(out=tmp_path / "run"))
    with pytest.raises(ValueError, match="run of other settings"):
        Workspace(DemoSettings(out=tmp_path / "run", seed=1))
    fresh = Workspace(DemoSettings(out=tmp_path / "run", seed=1, resume=False))
    assert not fresh.is_done("corpora")


def test_foreign_files_are_left_alone(tmp_path) -> None:
    keep = tmp_path / "thesis.tex"
    keep.write_text("mine")
    with pytest.raises(ValueError, match="no run of the demo"):
        Workspace(DemoSettings(out=tmp_path, resume=False))
    assert keep.read_text() == "mine"


def test_a_damaged_manifest_is_named(tmp_path) -> None:
    Workspace(DemoSettings(out=tmp_path / "run"))
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Workspace(DemoSettings(out=tmp_path / "run"))


# progress


def test_progress_without_a_terminal_says_what_is_left() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100)
    with DemoProgress({"a": 1.0, "b": 3.0}, console) as progress:
        progress.skip("a")
        with progress.step("b") as step:
            step.start(10)
            step.advance_to(5, "loss 1.00")
    lines = out.getvalue().splitlines()
    assert lines[0] == "a: done before"
    assert re.fullmatch(r"b: \d+ s, about 0 s left", lines[1])


# report


@pytest.fixture
def result() -> DemoResult:
    picture = thumbnail(Image.new("RGB", (16, 16)))
    sample = Sample(picture, "test", "user: What <b>digit</b>?", "It is four.", 0.75, (3, 1))
    token = ArmResult("token RL", "role-play", Interval(0.5, 0.4, 0.6), Interval(0.4, 0.3, 0.5),
                      0.55, 0.45, 0.9, 12.0, 8.0, curve=(0.1, 0.4, 0.5))  # fmt: skip
    latent = dataclasses.replace(
        token, arm="latent RL", codes_used=7, code_perplexity=4.2, code_counts=(5, 3, 0, 1),
        samples=(sample,),
    )  # fmt: skip
    return DemoResult(
        settings={"algorithm": "grpo", "seed": 3},
        machine={"processor": "test"},
        arms=(token, latent),
        world_model=WorldModelNumbers(1.0, 0.2, 3.0, 1.1),
        num_codes=4,
        step_seconds={"corpora": 1.0, "evaluation": 2.0},
        losses={"base model": (3.0, 2.0, 1.0)},
        code_tokens={0: ("four", "<script>")},
        rl_budget=640,
        evaluation_seeds=4,
    )


def test_the_table_has_a_row_per_arm_with_its_intervals(result) -> None:
    out = io.StringIO()
    Console(file=out, width=140).print(report.table(result))
    text = out.getvalue()
    assert text.count("0.500 ± 0.100") == 2
    assert "640 rollouts per RL arm" in text
    assert re.search(r"latent RL.*\b7\b", text)


def test_the_report_stands_alone_and_escapes_what_models_say(result, tmp_path) -> None:
    report.write_report(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "What &lt;b&gt;digit&lt;/b&gt;?" in page
    assert "<script>" not in page
    # Nothing is fetched: every source is inlined.
    assert re.findall(r'(?:src|href)="(?!data:|#)', page) == []
    assert page.count("data:image/png;base64,") == 1
    assert page.count("<svg") == 2
    assert "codes 3 1" in page


def test_the_picture_is_an_image(result, tmp_path) -> None:
    report.write_picture(result, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 900


def test_an_arm_survives_json(result) -> None:
    arm = result.arms[1]
    assert result_from_json(json.loads(json.dumps(dataclasses.asdict(arm)))) == arm
