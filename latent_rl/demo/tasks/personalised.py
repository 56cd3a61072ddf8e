"""Personalised answers: what the picture means to the user in their role at the place."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from latent_rl.data import load_pcogalign
from latent_rl.demo.dialogues import answer_in_role, ideal_in_role
from latent_rl.demo.scans import Scans, digit_of, read_scans
from latent_rl.demo.tasks.base import (
    CLEAN_QUALITY,
    DEFAULT_QUALITY,
    Amounts,
    Row,
    TaskRewards,
    task_rewards,
)
from latent_rl.demo.world import ACTIONS, DIGITS, RoleSet, role_sets
from latent_rl.eval.writing import write_json
from latent_rl.rewards import NamesTheFact, RewardValue, completion_text

__all__ = ["Personalised", "RoleFit"]

_TRAIN_SETS, _HELD_OUT_SETS = 70, 20
_QUERIES = ("I am at {place}. What should I do?", "I am at {place}. What is this for?")


class RoleFit:
    """1 where the answer gives the action of the user's role, with the picture's digit, and no
    other role's action; else 0.
    """

    __name__ = "role_fit"

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> list[RewardValue]:
        """See the class; needs the columns ``role`` and ``digit``."""
        wanted = zip(columns["role"], columns["digit"], strict=True)
        return [
            self.score(completion_text(completion), role, digit)
            for completion, (role, digit) in zip(completions, wanted, strict=True)
        ]

    def score(self, text: str, role: str, digit: str) -> float:
        """1 or 0 for one answer."""
        lowered = text.lower()
        # No two roles share the beginning of their action.
        given = {r for r, deed in ACTIONS.items() if deed.split("{")[0].lower() in lowered}
        deed = ACTIONS[role].format(digit=digit).rstrip(".").lower()
        return float(given == {role} and deed in lowered)


class Personalised:
    """The personalised task, in PCogAlignBench's format."""

    name = "personalised"

    def write(self, directory: Path, scans: Scans, amounts: Amounts, *, seed: int) -> None:
        """See :class:`latent_rl.demo.tasks.base.Task`."""
        rng = random.Random(f"{seed}-{self.name}")
        known, unseen = role_sets(seed, _TRAIN_SETS, _HELD_OUT_SETS)
        parts = {
            "sft": (known, scans.train, amounts.dialogues),
            "rl": (known, scans.train, amounts.rl),
            "test": (known, scans.test, amounts.test),
            "ood": (unseen, scans.test, amounts.test),
        }
        for part, (sets, pictures, count) in parts.items():
            records = [
                _record(rng, rng.choice(sets), *rng.choice(pictures), part == "sft")
                for _ in range(count)
            ]
            write_json(directory / f"{self.name}-{part}.json", records)
        texts = [_text_only(rng, rng.choice(known)) for _ in range(amounts.texts)]
        write_json(directory / f"{self.name}-text.json", texts)

    def dialogues(self, directory: Path) -> list[Row]:
        """See :class:`latent_rl.demo.tasks.base.Task`."""
        return load_pcogalign(directory / f"{self.name}-sft.json")

    def texts(self, directory: Path) -> list[Row]:
        """See :class:`latent_rl.demo.tasks.base.Task`."""
        path = directory / f"{self.name}-text.json"
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
        return rows

    def prompts(self, directory: Path, split: str) -> list[Row]:
        """See :class:`latent_rl.demo.tasks.base.Task`."""
        digits = digit_of(read_scans(directory))
        return [
            {
                "prompt": row["prompt"],
                "images": row["images"],
                "reference": row["reference"],
                "digit": digits[Path(row["images"][0]).name],
                "role": row["role_set"][row["location"]],
            }
            for row in load_pcogalign(directory / f"{self.name}-{split}.json", prompts=True)
        ]

    def rewards(self) -> TaskRewards:
        """See :class:`latent_rl.demo.tasks.base.Task`."""
        return task_rewards(NamesTheFact(DIGITS, "digit", "correct"), None, RoleFit())


def _record(
    rng: random.Random, role_set: RoleSet, scan: str, digit: int, mixed: bool
) -> dict[str, Any]:
    place, role = rng.choice(role_set)
    answer = (
        answer_in_role(rng, DEFAULT_QUALITY, role_set, place, digit)
        if mixed
        else ideal_in_role(role_set, place, digit)
    )
    return {
        "individual_RoleSet": dict(role_set),
        "query": rng.choice(_QUERIES).format(place=place),
        "image": {"file_path": scan},
        "eval_info": {
            "ImageDesc": f"A handwritten {DIGITS[digit]}.",
            "location": place,
            "EvalHelp": f"A {role} would: {ACTIONS[role].format(digit=DIGITS[digit])}",
        },
        "golden_response": answer,
    }


def _text_only(rng: random.Random, role_set: RoleSet) -> Row:
    """A dialogue whose digit is told in words."""
    digit = rng.randrange(10)
    place, _ = rng.choice(role_set)
    roles = "\n".join(f"{where}: {role}" for where, role in role_set)
    query = rng.choice(_QUERIES).format(place=place)
    answer = answer_in_role(rng, CLEAN_QUALITY, role_set, place, digit)
    return {
        "messages": [
            {"role": "system", "content": f"Roles of the user\n{roles}"},
            {"role": "user", "content": f"The card says {DIGITS[digit]}. {query}"},
            {"role": "assistant", "content": answer},
        ]
    }
