"""The corpora of the demo: written to disk in the benchmarks' formats and read back."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from latent_rl.data import load_paper_json
from latent_rl.demo.scans import Scans, write_scans
from latent_rl.demo.tasks import Amounts, Task
from latent_rl.demo.world import DIGITS, QUESTIONS
from latent_rl.eval.writing import write_json

__all__ = ["captions", "english_exchanges", "exchanges", "write_corpora"]

_CAPTIONS, _EXCHANGES = "captions.json", "exchanges.json"


def write_corpora(directory: Path, tasks: Sequence[Task], amounts: Amounts, *, seed: int) -> Scans:
    """Write the scans, their captions, the text-only exchanges and every task's files."""
    scans = write_scans(directory, seed=seed)
    rng = random.Random(f"{seed}-captions")
    write_json(directory / _CAPTIONS, [_caption(rng, *scan) for scan in scans.train * 2])
    pairs = [[a, b] for a, b in english_exchanges()]
    write_json(directory / _EXCHANGES, pairs)
    for task in tasks:
        task.write(directory, scans, amounts, seed=seed)
    return scans


def captions(directory: Path) -> list[dict[str, Any]]:
    """Plain questions and answers about the training scans, from the paper's format."""
    return load_paper_json(directory / _CAPTIONS)


def exchanges(directory: Path, *, max_characters: int = 120) -> list[dict[str, Any]]:
    """The text-only exchanges as conversation rows, long ones left out."""
    pairs = json.loads((directory / _EXCHANGES).read_text(encoding="utf-8"))
    return [
        {
            "messages": [
                {"role": "user", "content": said},
                {"role": "assistant", "content": answered},
            ]
        }
        for said, answered in pairs
        if len(said) + len(answered) <= max_characters
    ]


def english_exchanges() -> list[tuple[str, str]]:
    """The English exchanges of chatterbot-corpus: every question with each of its answers."""
    import chatterbot_corpus

    folder = Path(chatterbot_corpus.__file__).parent / "data" / "english"
    pairs = []
    for path in sorted(folder.glob("*.yml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for turns in content["conversations"]:
            said = [str(turn).strip() for turn in turns]
            pairs += [(a, b) for a, b in itertools.pairwise(said) if a and b]
    return pairs


def _caption(rng: random.Random, scan: str, digit: int) -> dict[str, Any]:
    question = rng.choice(QUESTIONS)
    fact = question.fact(digit)
    answer = f"It is {DIGITS[digit]}, {fact}." if fact else f"It is {DIGITS[digit]}."
    return {
        "id": Path(scan).stem,
        "images": [scan],
        "messages": [
            {"role": "user", "content": f"<image>\n{question.text}"},
            {"role": "assistant", "content": answer},
        ],
        "instance_type": "caption",
    }
