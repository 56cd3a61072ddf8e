"""Rows that people write: what is taken, and what an error says of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latent_rl.data import conversation_of, load_chat

ANSWER = {"role": "assistant", "content": "two"}


def row(content: object, **columns: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}, ANSWER], **columns}


@pytest.mark.parametrize(
    "text",
    ["", "مرحبا \u202e שלום", "👩‍👩‍👧‍👦", "a\u2028b\x85c\x00d", "word " * 5000],
    ids=["empty", "right to left", "joined emoji", "separators", "long"],
)
def test_any_text_comes_through_unchanged(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row(text), ensure_ascii=False) for _ in range(2)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    for loaded in load_chat(path):
        messages, images = conversation_of(loaded)
        assert messages[0]["content"] == [{"type": "text", "text": text}]
        assert images == []


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("hi")), encoding="utf-8-sig")
    assert load_chat(path) == [row("hi")]


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(row("hi"))
    path.write_text(f"{good}\n\n{good[:20]}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: not JSON"):
        load_chat(path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(None), r"7, messages\[0\]: content must be text or a list .*, got None"),
        (row(["two"]), r"content must be text or a list of text and image parts, got \['two'\]"),
        (row([{"type": "text"}]), "the text of a part must be text, got None"),
        (row("\ud800 x"), "the text is no Unicode"),
        (row("hi", images="a.png"), "'images' must be a list of images .*, got str"),
        (row("hi", images=[None]), "'images' holds None"),
        (row([{"type": "video"}]), "part type must be text or image, got 'video'"),
    ],
    ids=["none", "strings", "no text", "surrogate", "bare path", "no image", "video"],
)
def test_what_cannot_be_read_is_named_with_its_row(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversation_of(bad, "row 7")
