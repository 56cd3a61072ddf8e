"""Small synthetic files in the benchmarks' formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def write_image(folder: Path, name: str = "a.png", size: tuple[int, int] = (32, 32)) -> str:
    """A plain picture; returns its name."""
    Image.new("RGB", size, (200, 30, 30)).save(folder / name)
    return name


def write_records(folder: Path, records: list[dict[str, Any]]) -> Path:
    """The records as a JSON file in ``folder``."""
    path = folder / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def mmrole(image: str, **changes: Any) -> dict[str, Any]:
    """A comment dialogue of two exchanges."""
    return {
        "id": "7",
        "image_path": image,
        "conversations": [
            {"role": "human", "content": "<image>\nWhat is this?"},
            {"role": "Sea Dog", "content": "Arr, a red square."},
            {"role": "human", "content": "Do you like it?"},
            {"role": "Sea Dog", "content": "Aye."},
        ],
        "original_roles": ["human", "Sea Dog"],
        "character_role": "Sea Dog",
        "character_profile": {"Sea Dog": {"personality": "gruff", "catchphrase": "Arr!"}},
        **changes,
    }


def pcogalign(image: str, **changes: Any) -> dict[str, Any]:
    """A personalised question."""
    return {
        "individual_RoleSet": {"home": "parent", "school": "teacher"},
        "query": "I am at school. What should I do?",
        "image": {"file_path": image},
        "eval_info": {"ImageDesc": "a square", "location": "school", "EvalHelp": "teach"},
        "golden_response": "Show it to the class.",
        **changes,
    }


def paper(image: str, **changes: Any) -> dict[str, Any]:
    """A paired record with its marker in the text."""
    return {
        "id": 3,
        "images": [image],
        "messages": [
            {"role": "user", "content": "<image>\nWhat is this?"},
            {"role": "assistant", "content": "A red square."},
        ],
        "instance_type": "qa",
        **changes,
    }
