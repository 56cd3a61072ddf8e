"""The demo's tasks: files read back through the adapters, honest rewards, real splits."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from latent_rl.demo.corpus import captions, english_exchanges, exchanges, write_corpora
from latent_rl.demo.scans import Scans, read_scans
from latent_rl.demo.tasks import SPLITS, TASKS, Amounts, Task
from latent_rl.demo.tasks.personalised import RoleFit
from latent_rl.demo.tasks.role_play import PersonaFit
from latent_rl.demo.world import ACTIONS, DIGITS, personas, role_sets
from latent_rl.rewards import score_all

AMOUNTS = Amounts(dialogues=300, texts=40, rl=120, test=120)
tasks = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_corpora(folder, list(TASKS.values()), AMOUNTS, seed=3)
    return folder


@pytest.fixture(scope="module")
def scans(data: Path) -> Scans:
    return read_scans(data)


def rewards_of(task: Task, rows: Sequence[Any], answers: Sequence[str]) -> list[float]:
    rewards = task.rewards()
    table = score_all(
        rewards.functions,
        prompts=[row["prompt"] for row in rows],
        completions=[[{"role": "assistant", "content": text}] for text in answers],
        completion_ids=[[] for _ in rows],
        columns={k: [row[k] for row in rows] for k in rows[0] if k != "prompt"},
        weights=rewards.weights,
    )
    assert all(table.keep_mask), table.errors
    return list(table.rewards)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def prompt_text(row: Any) -> str:
    return " ".join(p.get("text", "") for m in row["prompt"] for p in m["content"])


# Honest rewards.


@tasks
@pytest.mark.parametrize("split", SPLITS)
def test_the_ideal_answer_earns_everything(task: Task, data: Path, split: str) -> None:
    rows = task.prompts(data, split)
    assert rewards_of(task, rows, [row["reference"] for row in rows]) == pytest.approx(
        [1.0] * len(rows)
    )


@tasks
def test_one_answer_for_every_picture_earns_little(task: Task, data: Path) -> None:
    rows = task.prompts(data, "test")
    best = max(mean(rewards_of(task, rows, [row["reference"]] * len(rows))) for row in rows[:30])
    assert best < 0.2


@tasks
def test_a_perfect_voice_blind_to_the_picture_earns_little(task: Task, data: Path) -> None:
    """The failure mode of an unconditional reward: right style, whatever the picture shows."""
    rows = task.prompts(data, "test")
    any_digit = re.compile("|".join(DIGITS))
    for digit in DIGITS:
        answers = [any_digit.sub(digit, row["reference"]) for row in rows]
        assert mean(rewards_of(task, rows, answers)) < 0.25


@tasks
def test_a_copied_prompt_earns_nothing(task: Task, data: Path) -> None:
    rows = task.prompts(data, "test")
    assert max(rewards_of(task, rows, [prompt_text(row) for row in rows])) == 0


@tasks
def test_hedging_earns_nothing(task: Task, data: Path) -> None:
    rows = task.prompts(data, "test")
    other = [DIGITS[(DIGITS.index(row["digit"]) + 1) % 10] for row in rows]
    hedged = [f"{row['reference']} Or {o}." for row, o in zip(rows, other, strict=True)]
    listed = [f"{row['reference']} {' '.join(DIGITS)}." for row in rows]
    assert max(rewards_of(task, rows, hedged)) == 0
    assert max(rewards_of(task, rows, listed)) == 0


@tasks
def test_better_answers_earn_more(task: Task, data: Path) -> None:
    """Correct but curt < correct and sloppy < ideal, on every row."""
    rows = task.prompts(data, "test")
    curt = rewards_of(task, rows, [_curt(row) for row in rows])
    sloppy = rewards_of(task, rows, [_lower_first(row["reference"]) for row in rows])
    for low, middle in zip(curt, sloppy, strict=True):
        assert 0 < low < middle < 1


def _curt(row: Any) -> str:
    return f"It is {row['digit']}, {row['fact']}." if row.get("fact") else f"It is {row['digit']}."


def _lower_first(text: str) -> str:
    return text[0].lower() + text[1:]


def test_persona_fit_counts_marks_in_their_place() -> None:
    score = PersonaFit().score
    voice = ("Ahoy", "captain", "Stay golden!")
    assert score("Ahoy captain, it is two. Stay golden!", *voice) == 1
    assert score("Ahoy captain, it is two.", *voice) == pytest.approx(2 / 3)
    assert score("It is two. Stay golden!", *voice) == pytest.approx(1 / 3)
    # Somebody else's word beside the right one does not count, nor does a catchphrase up front.
    assert score("Ahoy Howdy captain, it is two.", *voice) == pytest.approx(1 / 3)
    assert score("Stay golden! It is two.", *voice) == 0
    assert score("Ahoy captain Stay golden! it is two", *voice) == 0


def test_role_fit_needs_the_right_action_alone_with_its_digit() -> None:
    score = RoleFit().score
    assert score("At home, count two coins.", "cashier", "two") == 1
    assert score("At home, count one coins.", "cashier", "two") == 0
    assert score("At home, run two laps.", "cashier", "two") == 0
    assert score("Count two coins. Run two laps.", "cashier", "two") == 0


def test_no_two_roles_share_the_beginning_of_their_action() -> None:
    beginnings = [deed.split("{")[0].lower() for deed in ACTIONS.values()]
    for a, b in itertools.permutations(beginnings, 2):
        assert a not in b


# Data.


def test_pictures_of_training_and_test_are_apart(scans: Scans) -> None:
    train, test = ({name for name, _ in part} for part in (scans.train, scans.test))
    assert not train & test
    assert len(train) + len(test) == 1797
    assert set(Counter(digit for _, digit in scans.test)) == set(range(10))


@tasks
def test_splits_show_the_pictures_they_should(task: Task, data: Path, scans: Scans) -> None:
    test = {Path(name).name for name, _ in scans.test}
    for rows, held_out in (
        (task.dialogues(data), False),
        (task.prompts(data, "rl"), False),
        (task.prompts(data, "test"), True),
        (task.prompts(data, "ood"), True),
    ):
        assert {Path(row["images"][0]).name in test for row in rows} == {held_out}


@tasks
def test_ood_is_unseen_but_of_known_words(task: Task, data: Path) -> None:
    def systems(rows: Sequence[Any], column: str) -> set[str]:
        return {row[column][0]["content"][0]["text"].split("\n", 1)[1] for row in rows}

    seen = systems(task.dialogues(data), "messages") | systems(task.prompts(data, "rl"), "prompt")
    unseen = systems(task.prompts(data, "ood"), "prompt")
    assert not seen & unseen
    known = set(re.findall(r"\w+", " ".join(seen)))
    assert set(re.findall(r"\w+", " ".join(unseen))) <= known


@pytest.mark.parametrize("make", [personas, role_sets])
def test_held_out_combinations_are_apart(make: Callable[..., Any]) -> None:
    known, unseen = make(0, 70, 20)
    assert (len(known), len(unseen)) == (70, 20)
    words = [
        {repr(x).split("name=")[-1].split(",", 1)[-1] for x in part} for part in (known, unseen)
    ]
    assert not words[0] & words[1]
    with pytest.raises(ValueError, match="at most"):
        make(0, 1000, 1000)


@tasks
def test_dialogues_are_of_mixed_quality(task: Task, data: Path) -> None:
    """Neither worthless nor perfect: reinforcement needs room, and something to start from."""
    rows = task.prompts(data, "sft")
    rewards = rewards_of(task, rows, [row["reference"] for row in rows])
    assert 0.4 < mean(rewards) < 0.75
    assert min(rewards) == 0
    assert sum(reward == pytest.approx(1) for reward in rewards) / len(rewards) > 0.04


@tasks
def test_text_dialogues_have_no_picture_and_tell_the_digit(task: Task, data: Path) -> None:
    for row in task.texts(data):
        assert not row.get("images")
        said = row["messages"][1]["content"]
        (digit,) = set(re.findall(r"\w+", said)) & set(DIGITS)
        assert digit in row["messages"][-1]["content"]


def test_english_exchanges_are_the_real_corpus(data: Path) -> None:
    pairs = english_exchanges()
    assert len(pairs) >= 2026
    assert all(said and answered for said, answered in pairs)
    short = exchanges(data, max_characters=60)
    assert 0 < len(short) < len(exchanges(data)) < len(pairs) + 1


def test_captions_come_back_with_their_pictures(data: Path, scans: Scans) -> None:
    digits = {Path(name).name: DIGITS[digit] for name, digit in scans.train}
    for row in captions(data)[:50]:
        answer = row["messages"][-1]["content"][0]["text"]
        assert digits[Path(row["images"][0]).name] in answer


def test_the_same_seed_writes_the_same_files(tmp_path: Path, data: Path) -> None:
    again = tmp_path / "again"
    write_corpora(again, list(TASKS.values()), AMOUNTS, seed=3)
    for path in sorted(data.glob("*.json")):
        assert path.read_bytes() == (again / path.name).read_bytes()
    other = tmp_path / "other"
    write_corpora(other, list(TASKS.values()), AMOUNTS, seed=4)
    assert (data / "labels.json").read_bytes() != (other / "labels.json").read_bytes()
