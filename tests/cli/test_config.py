"""Recipes: what is read, and what every mistake in one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from latent_rl.config import Recipe, RecipeError, load_recipe

ROOT = Path(__file__).resolve().parents[2]

SMALL = """
model: {backbone: some/model, latent: {num_codes: 8}}
data: {rows: {path: rows.jsonl}}
stages: [{stage: joint, data: rows, arguments: {learning_rate: 1e-4}}]
"""


def read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def test_values_arrive_with_their_types_and_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, SMALL)
    assert recipe.model.backbone == "some/model"
    assert recipe.model.latent == {"num_codes": 8}
    assert recipe.data["rows"].path == Path("rows.jsonl")
    assert recipe.data["rows"].format == "chat"
    assert recipe.stages[0].data == ("rows",)
    assert recipe.rl is None
    assert recipe.seed == 0


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "+1e-4", ".1e-3"])
def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path, text: str) -> None:
    recipe = read(tmp_path, SMALL.replace("1e-4", text))
    assert recipe.stages[0].arguments["learning_rate"] == pytest.approx(1e-4)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_are_readable(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.stages
    assert recipe.rl is not None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stages:", "stagse:", "unknown key 'stagse'; did you mean 'stages'?"),
        ("backbone:", "backbon:", "model: unknown key 'backbon'; did you mean 'backbone'?"),
        ("data: rows,", "data: row,", "stages[0].data: no data set 'row'; did you mean 'rows'?"),
        ("{stage: joint, data: rows,", "{data: rows,", "stages[0]: needs stage"),
        ("path: rows.jsonl", "path: 3", "data.rows.path: expected a path, got 3"),
        ("path: rows.jsonl", "path: a, limit: yes", "data.rows.limit: expected a whole number"),
        ("path: rows.jsonl", "path: a, limit: 0", "data.rows: limit must be >= 1, got 0"),
        ("backbone: some/model,", "", "model: needs backbone, checkpoint or both"),
        ("backbone: some/model", "backbone: a, dtype: int8", "model: dtype must be one of auto"),
        ("model:", "version: 2\nmodel:", "version must be 1, got 2"),
        ("stages: [", "other: [", "unknown key 'other'"),
        ("{num_codes: 8}", "8", "model.latent: expected a mapping, got 8"),
        ("data: rows,", "data: [],", "stages[0].data: names no data set"),
        ("model:", "seed: 0\nseed: 1\nmodel:", "key 'seed' is given twice"),
        ("model:", "model: [", "not readable as YAML"),
    ],
)
def test_a_mistake_is_named_with_its_place(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in SMALL
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, SMALL.replace(old, new))
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_without_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs stages, rl or both"):
        read(tmp_path, SMALL[: SMALL.index("stages:")])


def test_rl_needs_a_reward(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="rl: needs at least one reward"):
        read(tmp_path, SMALL + "rl: {data: rows, rewards: []}\n")


def test_an_empty_file_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected a mapping, got nothing"):
        read(tmp_path, "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml: no such recipe"):
        load_recipe(tmp_path / "absent.yaml")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not readable as YAML"):
        read(tmp_path, "!!python/object/apply:os.getcwd []")
