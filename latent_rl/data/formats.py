"""The benchmarks' own JSON formats, read into rows.

- the paper's pre-training files: ``id, images[], messages[], instance_type`` with ``<image>``
  markers in the text;
- MMRole: ``id, image_path, conversations[{role, content}], original_roles, character_role,
  character_profile``; only *comment* dialogues, one RL prompt per turn of the character;
- PCogAlignBench: ``individual_RoleSet{location: role}, query, image.file_path, eval_info,
  golden_response``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_rl.data.rows import Message

__all__ = ["load_mmrole", "load_paper_json", "load_pcogalign", "role_play_instructions"]

_IMAGE_MARKER = re.compile(r"<image>\n?")
_PROFILE_FIELDS = ("introduction", "personality", "experience", "relationship", "catchphrase")


def load_paper_json(path: str | Path, image_root: str | Path | None = None) -> list[dict[str, Any]]:
    """Conversation rows of one of the paper's pre-training files, paired or text-only.

    Args:
        path: a JSON list of records.
        image_root: folder the records' image paths are relative to; defaults to the file's.

    Raises:
        FileNotFoundError: when the file or an image it names is missing.
        ValueError: naming the record, for a missing field or markers that do not fit its images.
    """
    rows = []
    for where, record in _records(path):
        names = record.get("images") or []
        messages = _field(record, "messages", list, where)
        turns = [_with_image_parts(m, where) for m in messages if m.get("content")]
        markers = sum(part["type"] == "image" for t in turns for part in t["content"])
        # Captions, news and encyclopaedia pages name their image in no turn: `conversation_of` puts
        # it before the first user turn's text.
        if markers not in (0, len(names)):
            raise ValueError(f"{where}: {markers} <image> markers but {len(names)} images")
        rows.append(
            {
                "id": str(record.get("id", "")),
                "messages": turns,
                "images": [_image_path(name, path, image_root, where) for name in names],
                "instance_type": str(record.get("instance_type", "")),
            }
        )
    return rows


def load_mmrole(
    path: str | Path, image_root: str | Path | None = None, *, prompts: bool = False
) -> list[dict[str, Any]]:
    """Role-play dialogues of MMRole.

    Args:
        path: a JSON list of records; dialogues other than comments (those whose user is another
            character) are left out.
        image_root: folder the records' image paths are relative to; defaults to the file's.
        prompts: False gives one conversation row per dialogue (``messages``); True one RL row per
            turn of the character (``prompt``, ``reference``).

    Returns:
        Rows with ``images``, ``character`` and ``profile`` (the character's fields, missing ones
        as "").

    Raises:
        FileNotFoundError: when the file or an image it names is missing.
        ValueError: naming the record, for missing fields.
    """
    rows: list[dict[str, Any]] = []
    for where, record in _records(path):
        character = _field(record, "character_role", (str, list), where)
        character = character if isinstance(character, str) else character[0]
        if not _is_comment(record, character):
            continue
        profiles = _field(record, "character_profile", dict, where)
        if character not in profiles:
            raise ValueError(f"{where}: character_profile has no entry for {character!r}")
        profile = {name: str(profiles[character].get(name, "")) for name in _PROFILE_FIELDS}
        image = _image_path(_field(record, "image_path", str, where), path, image_root, where)
        turns = _field(record, "conversations", list, where)
        messages = _role_play_messages(turns, character, profile, where)
        common = {
            "id": str(record.get("id", "")),
            "images": [image],
            "character": character,
            "profile": profile,
        }
        if not prompts:
            rows.append({**common, "messages": messages})
            continue
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                reference = message["content"][0]["text"]
                rows.append({**common, "prompt": messages[:i], "reference": reference})
    return rows


def load_pcogalign(
    path: str | Path, image_root: str | Path | None = None, *, prompts: bool = False
) -> list[dict[str, Any]]:
    """Personalised questions of PCogAlignBench.

    Args:
        path: a JSON list of records.
        image_root: folder the records' image paths are relative to; defaults to the file's.
        prompts: False gives conversation rows with the golden response; True RL rows (``prompt``,
            ``reference``).

    Returns:
        Rows with ``images``, ``role_set`` (location -> role), ``location`` and ``eval_help``.

    Raises:
        FileNotFoundError: when the file or an image it names is missing.
        ValueError: naming the record, for missing fields.
    """
    rows = []
    for where, record in _records(path):
        role_set = _field(record, "individual_RoleSet", dict, where)
        info = _field(record, "eval_info", dict, where)
        image = _field(record, "image", dict, where)
        file_path = _field(image, "file_path", str, f"{where}, image")
        roles = "\n".join(f"{place}: {role}" for place, role in role_set.items())
        prompt = [
            _text_message("system", f"Roles of the user\n{roles}"),
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": _field(record, "query", str, where)},
                ],
            },
        ]
        golden = record.get("golden_response")
        row: dict[str, Any] = {
            "images": [_image_path(file_path, path, image_root, where)],
            "role_set": dict(role_set),
            "location": _field(info, "location", str, f"{where}, eval_info"),
            "eval_help": str(info.get("EvalHelp", "")),
        }
        if prompts:
            row |= {"prompt": prompt, "reference": golden or ""}
        else:
            answer = _field(record, "golden_response", str, where)
            row["messages"] = [*prompt, _text_message("assistant", answer)]
        rows.append(row)
    return rows


def role_play_instructions(character: str, profile: Mapping[str, str]) -> str:
    """The system turn of a role-play: the character's name and the profile fields it has."""
    known = [f"{name.capitalize()}: {profile[name]}" for name in _PROFILE_FIELDS if profile[name]]
    return "\n".join([f"You are {character}.", *known])


def _records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"data: no such file: {source}")
    try:
        records = json.loads(source.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: not a JSON file: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{source}: expected a JSON list of records")
    for index, record in enumerate(records):
        where = f"{source}, record {index}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
        yield where, record


def _field(record: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = record.get(name)
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(k.__name__ for k in kinds)
        got = "nothing" if name not in record else type(value).__name__
        raise ValueError(f"{where}: field {name!r} must be {expected}, got {got}")
    return value


def _image_path(name: str, source: str | Path, image_root: str | Path | None, where: str) -> str:
    root = Path(source).parent if image_root is None else Path(image_root)
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(f"{where}: image is missing: {path}")
    return str(path)


def _text_message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _with_image_parts(message: Mapping[str, Any], where: str) -> Message:
    text = _field(message, "content", str, where)
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(_IMAGE_MARKER.split(text)):
        if index:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return {"role": _field(message, "role", str, where), "content": parts}


def _is_comment(record: Mapping[str, Any], character: str) -> bool:
    """In MMRole's comment dialogues nobody but the character and a human speaks."""
    others = {str(turn.get("role")) for turn in record.get("conversations", ())} - {character}
    return others <= {"human", "user", "Human", "User", "system", "assistant", "gpt"}


def _role_play_messages(
    turns: Sequence[Any], character: str, profile: Mapping[str, str], where: str
) -> list[Message]:
    messages = [_text_message("system", role_play_instructions(character, profile))]
    for turn in turns:
        speaker = _field(turn, "role", str, where)
        text = _IMAGE_MARKER.sub("", _field(turn, "content", str, where))
        speaks = speaker in (character, "assistant", "gpt")
        messages.append(_text_message("assistant" if speaks else "user", text))
    first_user = next((m for m in messages if m["role"] == "user"), None)
    if first_user is None:
        raise ValueError(f"{where}: conversations has no turn of the user")
    first_user["content"].insert(0, {"type": "image"})
    return messages
