"""Role-play: a persona answers a question about the picture in its own voice."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_rl.data import load_mmrole, role_play_instructions
from latent_rl.demo.dialogues import answer_as_persona, ideal_as_persona
from latent_rl.demo.scans import Scans, digit_of, read_scans
from latent_rl.demo.tasks.base import (
    CLEAN_QUALITY,
    DEFAULT_QUALITY,
    Amounts,
    Row,
    TaskRewards,
    task_rewards,
)
from latent_rl.demo.world import (
    ADDRESSES,
    CATCHPHRASES,
    DIGITS,
    GREETINGS,
    PARITIES,
    QUESTIONS,
    SIZES,
    Persona,
    Question,
    personas,
)
from latent_rl.eval.writing import write_json
from latent_rl.rewards import NamesTheFact, RewardValue, completion_text

__all__ = ["PersonaFit", "RolePlay"]

_TRAIN_PERSONAS, _HELD_OUT_PERSONAS = 300, 100
_BY_TEXT = {question.text: question for question in QUESTIONS}


class PersonaFit:
    """Share of the persona's three marks in place: greeting and address open the answer, the
    catchphrase ends it. A mark counts only if no other persona's word stands for it.
    """

    __name__ = "persona_fit"

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> list[RewardValue]:
        """See the class; needs the columns ``greeting``, ``address`` and ``catchphrase``."""
        voices = zip(columns["greeting"], columns["address"], columns["catchphrase"], strict=True)
        return [
            self.score(completion_text(completion), *voice)
            for completion, voice in zip(completions, voices, strict=True)
        ]

    def score(self, text: str, greeting: str, address: str, catchphrase: str) -> float:
        """The share of marks of one answer."""
        opening = text.split(",", 1)[0] if "," in text else ""
        marks = (
            _only(opening, greeting, GREETINGS),
            _only(opening, address, ADDRESSES),
            text.rstrip().endswith(catchphrase) and _only(text, catchphrase, CATCHPHRASES),
        )
        return sum(marks) / len(marks)


def _only(text: str, right: str, alternatives: Sequence[str]) -> bool:
    found = {a for a in alternatives if re.search(rf"(?<!\w){re.escape(a)}(?!\w)", text, re.I)}
    return found == {right}


class RolePlay:
    """The role-play task, in MMRole's format."""

    name = "role-play"

    def write(self, directory: Path, scans: Scans, amounts: Amounts, *, seed: int) -> None:
        """See :class:`latent_rl.demo.tasks.base.Task`."""
        rng = random.Random(f"{seed}-{self.name}")
        known, unseen = personas(seed, _TRAIN_PERSONAS, _HELD_OUT_PERSONAS)
        parts = {
            "sft": (known, scans.train, amounts.dialogues),
            "rl": (known, scans.train, amounts.rl),
            "test": (known, scans.test, amounts.test),
            "ood": (unseen, scans.test, amounts.test),
        }
        for part, (voices, pictures, count) in parts.items():
            records = [
                _record(
                    rng, f"{part}-{i}", rng.choice(voices), *rng.choice(pictures), part == "sft"
                )
                for i in range(count)
            ]
            write_json(directory / f"{self.name}-{part}.json", records)
        texts = [_text_only(rng, rng.choice(known)) for _ in range(amounts.texts)]
        write_json(directory / f"{self.name}-text.json", texts)

    def dialogues(self, directory: Path) -> list[Row]:
        """See :class:`latent_rl.demo.tasks.base.Task`."""
        return load_mmrole(directory / f"{self.name}-sft.json")

    def texts(self, directory: Path) -> list[Row]:
        """See :class:`latent_rl.demo.tasks.base.Task`."""
        path = directory / f"{self.name}-text.json"
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
        return rows

    def prompts(self, directory: Path, split: str) -> list[Row]:
        """See :class:`latent_rl.demo.tasks.base.Task`."""
        digits = digit_of(read_scans(directory))
        rows = []
        for row in load_mmrole(directory / f"{self.name}-{split}.json", prompts=True):
            voice = Persona.from_profile(row["character"], row["profile"])
            question = _BY_TEXT[row["prompt"][-1]["content"][-1]["text"]]
            digit = digits[Path(row["images"][0]).name]
            rows.append(
                {
                    "prompt": row["prompt"],
                    "images": row["images"],
                    "reference": row["reference"],
                    "digit": digit,
                    "fact": question.fact(DIGITS.index(digit)),
                    "greeting": voice.greeting,
                    "address": voice.address,
                    "catchphrase": voice.catchphrase,
                }
            )
        return rows

    def rewards(self) -> TaskRewards:
        """See :class:`latent_rl.demo.tasks.base.Task`."""
        return task_rewards(
            NamesTheFact(DIGITS, "digit", "correct"),
            NamesTheFact((*PARITIES, *SIZES), "fact", "fact"),
            PersonaFit(),
        )


def _record(
    rng: random.Random, name: str, voice: Persona, scan: str, digit: int, mixed: bool
) -> dict[str, Any]:
    question: Question = rng.choice(QUESTIONS)
    answer = (
        answer_as_persona(rng, DEFAULT_QUALITY, voice, question, digit)
        if mixed
        else ideal_as_persona(voice, question, digit)
    )
    return {
        "id": name,
        "image_path": scan,
        "conversations": [
            {"role": "human", "content": f"<image>\n{question.text}"},
            {"role": voice.name, "content": answer},
        ],
        "original_roles": ["human", voice.name],
        "character_role": voice.name,
        "character_profile": {voice.name: voice.profile()},
    }


def _text_only(rng: random.Random, voice: Persona) -> Row:
    """A dialogue whose digit is told in words."""
    digit, question = rng.randrange(10), rng.choice(QUESTIONS)
    system = role_play_instructions(voice.name, voice.profile())
    answer = answer_as_persona(rng, CLEAN_QUALITY, voice, question, digit)
    return {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": f"The card says {DIGITS[digit]}. {question.text}"},
            {"role": "assistant", "content": answer},
        ]
    }
