"""Adapters: what they read, and the one clear error they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latent_rl.data import conversation_of, load_mmrole, load_paper_json, load_pcogalign
from tests.data import fixtures as fx


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    return ["".join(part.get("text", "") for part in m["content"]) for m in messages]


def _kinds(message: dict[str, Any]) -> list[str]:
    return [part["type"] for part in message["content"]]


def test_paper_markers_become_image_parts(tmp_path: Path) -> None:
    image = fx.write_image(tmp_path)
    (row,) = load_paper_json(fx.write_records(tmp_path, [fx.paper(image)]))
    assert _kinds(row["messages"][0]) == ["image", "text"]
    assert _texts(row["messages"]) == ["What is this?", "A red square."]
    assert row["images"] == [str(tmp_path / image)]
    assert (row["id"], row["instance_type"]) == ("3", "qa")


def test_paper_text_only_record_has_no_images(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    record = {"id": "t", "messages": messages, "instance_type": "text"}
    (row,) = load_paper_json(fx.write_records(tmp_path, [record]))
    assert row["images"] == []
    assert all(_kinds(message) == ["text"] for message in row["messages"])


def test_paper_images_without_a_marker_come_first(tmp_path: Path) -> None:
    """As in the paper's captions, news and encyclopaedia pages, three quarters of its pairs."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Please observe the image."},
        {"role": "assistant", "content": "A red square."},
    ]
    image = fx.write_image(tmp_path)
    records = [fx.paper(image, messages=messages, instance_type="image_caption")]
    (row,) = load_paper_json(fx.write_records(tmp_path, records))
    turns, images = conversation_of(row)
    assert [_kinds(turn) for turn in turns] == [["text"], ["image", "text"], ["text"]]
    assert images == [str(tmp_path / image)]


def test_paper_markers_must_fit_the_images(tmp_path: Path) -> None:
    image = fx.write_image(tmp_path)
    path = fx.write_records(tmp_path, [fx.paper(image), fx.paper(image, images=[image, image])])
    with pytest.raises(ValueError, match=r"1.*1 <image> markers but 2 images"):
        load_paper_json(path)


def test_mmrole_conversation(tmp_path: Path) -> None:
    image = fx.write_image(tmp_path)
    (row,) = load_mmrole(fx.write_records(tmp_path, [fx.mmrole(image)]))
    assert [m["role"] for m in row["messages"]] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert _kinds(row["messages"][1]) == ["image", "text"]
    system = _texts(row["messages"])[0]
    assert "Sea Dog" in system
    assert "gruff" in system
    assert "Arr!" in system
    # A field the profile lacks leaves no trace in the instructions.
    assert "Experience" not in system
    assert row["profile"]["experience"] == ""


def test_mmrole_gives_one_prompt_per_turn_of_the_character(tmp_path: Path) -> None:
    image = fx.write_image(tmp_path)
    rows = load_mmrole(fx.write_records(tmp_path, [fx.mmrole(image)]), prompts=True)
    assert [row["reference"] for row in rows] == ["Arr, a red square.", "Aye."]
    assert [len(row["prompt"]) for row in rows] == [2, 4]
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)


def test_mmrole_leaves_out_dialogues_between_characters(tmp_path: Path) -> None:
    image = fx.write_image(tmp_path)
    turns = [{"role": "Queen", "content": "Who?"}, {"role": "Sea Dog", "content": "Me."}]
    path = fx.write_records(tmp_path, [fx.mmrole(image, conversations=turns), fx.mmrole(image)])
    assert len(load_mmrole(path)) == 1


def test_pcogalign_prompt_and_conversation(tmp_path: Path) -> None:
    image = fx.write_image(tmp_path)
    path = fx.write_records(tmp_path, [fx.pcogalign(image)])
    (conversation,) = load_pcogalign(path)
    (prompt,) = load_pcogalign(path, prompts=True)
    assert conversation["messages"][:-1] == prompt["prompt"]
    assert _texts(conversation["messages"])[-1] == prompt["reference"] == "Show it to the class."
    assert "school: teacher" in _texts(prompt["prompt"])[0]
    assert prompt["role_set"][prompt["location"]] == "teacher"
    assert prompt["eval_help"] == "teach"


@pytest.mark.parametrize(
    ("load", "record"),
    [(load_paper_json, fx.paper), (load_mmrole, fx.mmrole), (load_pcogalign, fx.pcogalign)],
)
def test_missing_image_names_the_record_and_the_path(
    tmp_path: Path, load: Any, record: Any
) -> None:
    path = fx.write_records(tmp_path, [record(fx.write_image(tmp_path)), record("gone.png")])
    with pytest.raises(FileNotFoundError, match=r"records\.json.*1.*gone\.png"):
        load(path)


@pytest.mark.parametrize(
    ("load", "record", "field"),
    [
        (load_paper_json, fx.paper, "messages"),
        (load_mmrole, fx.mmrole, "character_profile"),
        (load_pcogalign, fx.pcogalign, "individual_RoleSet"),
    ],
)
def test_wrong_column_names_the_record_and_the_field(
    tmp_path: Path, load: Any, record: Any, field: str
) -> None:
    broken = record(fx.write_image(tmp_path))
    broken["renamed"] = broken.pop(field)
    with pytest.raises(ValueError, match=rf"records\.json.*0.*'{field}'.*got nothing"):
        load(fx.write_records(tmp_path, [broken]))


def test_image_root_moves_the_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    image = fx.write_image(folder)
    path = fx.write_records(tmp_path, [fx.paper(image)])
    assert load_paper_json(path, folder)[0]["images"] == [str(folder / image)]
    with pytest.raises(FileNotFoundError):
        load_paper_json(path)


def test_a_file_that_is_no_list_of_records(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps({"rows": []}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"records\.json"):
        load_paper_json(path)
    path.write_text("[{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"records\.json"):
        load_paper_json(path)
