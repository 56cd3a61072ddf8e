"""`latent-rl generate`: answers, codes, steering, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from latent_rl.cli import run


@pytest.fixture(autouse=True)
def in_trained(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def ask(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """One answer as JSON."""
    arguments = ["generate", "run", "-p", "What is in the picture ?", "--max-new-tokens", "8"]
    assert run([*arguments, "--json", *options]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_an_answer_has_a_code_and_a_logprob_per_token(capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(capsys, "-i", "images/0.png")
    assert len(answer["tokens"]) == len(answer["codes"]) == len(answer["logprobs"]) > 0
    assert all(0 <= code < 8 for code in answer["codes"])
    assert all(logprob <= 0 for logprob in answer["logprobs"])


def test_the_seed_decides_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    image = ("-i", "images/0.png")
    first, again, other = (ask(capsys, *image, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first["codes"] != other["codes"]


def test_temperature_zero_needs_no_seed(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [ask(capsys, "--temperature", "0", "--seed", seed) for seed in ("1", "2")]
    assert answers[0] == answers[1]


def test_a_forced_code_is_taken_at_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(ask(capsys, "--code", "5")["codes"]) == {5}


def test_the_base_model_has_no_codes(capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(capsys, "--base")
    assert answer["codes"] == answer["logprobs"] == []
    assert answer["tokens"]


def test_several_images_and_a_system_message(capsys: pytest.CaptureFixture[str]) -> None:
    images = ("-i", "images/0.png", "-i", "images/1.png")
    assert ask(capsys, *images, "--system", "You look at a picture")["tokens"]


def test_text_and_codes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "run/03-joint", "-p", "hi", "--max-new-tokens", "3", "--code", "2"]
    assert run(arguments) == 0
    assert "codes (3, 1 distinct): 2 2 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "-p", "hi", "-i", "absent.png"], "no such file: absent.png"),
        (["run", "-p", "hi", "-i", "recipe.yaml"], "recipe.yaml cannot be decoded"),
        (["absent", "-p", "hi"], "absent: no such checkpoint"),
        (["images", "-p", "hi"], "images: holds neither latent_config.json nor a finished step"),
        (["run", "-p", "hi", "--code", "8"], "--code must be in [0, 8), got 8"),
        (["run", "-p", "hi", "--code", "1", "--base"], "--base uses no codes"),
        (["run", "-p", "hi", "--top-p", "1.5"], "'--top-p'"),
        (["run", "-p", "hi", "--temperature", "-1"], "'--temperature'"),
        (["run", "-p", "hi", "--device", "quantum"], "'quantum' is no torch device"),
        (["run", "-p", "hi", "--processor", "images"], "processor: no processor found"),
        (["run/03-joint", "-p", "hi", "--backbone", "./absent"], "./absent: no such directory"),
        (["run"], "Missing option '--prompt'"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["generate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_another_codebook_size_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(trained / "run" / "03-joint", broken)
    record = json.loads((broken / "latent_config.json").read_text(encoding="utf-8"))
    record["latent"]["num_codes"] = 16
    (broken / "latent_config.json").write_text(json.dumps(record), encoding="utf-8")
    assert run(["generate", str(broken), "-p", "hi"]) == 2
    error = capsys.readouterr().err
    assert "num_codes 16, but the weights beside it were saved with 8" in error
    assert error.count("\n") == 1


def test_a_corrupt_settings_file_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(trained / "run" / "03-joint", broken)
    (broken / "latent_config.json").write_text("{", encoding="utf-8")
    assert run(["generate", str(broken), "-p", "hi"]) == 2
    assert "latent_config.json is corrupt" in capsys.readouterr().err
