"""A directory with everything a tiny recipe needs: model, images, rows."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLOURS = ("red", "green", "blue", "red")


def load_tiny_models() -> ModuleType:
    """The shared factory of tiny models; tests are no package, so it is loaded by path."""
    name = "latent_rl_tiny_models"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "tiny_models.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once; tests get copies."""
    tiny = load_tiny_models()
    place = tmp_path_factory.mktemp("prepared")
    model, processor = tiny.tiny_vlm("llava")
    model.save_pretrained(place / "model")
    processor.save_pretrained(place / "model")
    (place / "images").mkdir()
    for index in range(len(COLOURS)):
        tiny.tiny_image(index).save(place / "images" / f"{index}.png")
    question = "What is in the picture ?"
    _write_rows(
        place / "paired.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": f"A {colour} house ."},
                ],
                "images": [f"{index}.png"],
            }
            for index, colour in enumerate(COLOURS)
        ],
    )
    _write_rows(
        place / "text.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "How many birds are there ?"},
                    {"role": "assistant", "content": f"There are {count} ."},
                ]
            }
            for count in ("one", "two", "three")
        ],
    )
    _write_rows(
        place / "prompts.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": question}],
                "images": [f"{index}.png"],
                "colour": colour,
            }
            for index, colour in enumerate(COLOURS)
        ],
    )
    shutil.copy(ROOT / "recipes" / "tiny.yaml", place / "recipe.yaml")
    return place


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test: a fresh copy of `prepared`."""
    place = tmp_path / "workspace"
    shutil.copytree(prepared, place)
    monkeypatch.chdir(place)
    monkeypatch.delenv("LATENT_RL_TRACEBACK", raising=False)
    return place


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the whole tiny recipe in its workspace; tests must not change it."""
    from latent_rl.cli import run

    place = tmp_path_factory.mktemp("trained") / "workspace"
    shutil.copytree(prepared, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert run(["train", "recipe.yaml"]) == 0
        # A model's own record of its base is a path; tests of other directories need it absolute.
        for record in place.glob("run/*/latent_config.json"):
            text = json.loads(record.read_text(encoding="utf-8"))
            if not text["base_model"]["included"]:
                text["base_model"]["name"] = str(place / "model")
                record.write_text(json.dumps(text), encoding="utf-8")
    return place
