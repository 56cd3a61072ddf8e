"""Answers of mixed quality: what the supervised corpora of the demo are made of.

Real dialogue corpora are uneven. These are too, on purpose: some answers are curt, some slip into
another voice or role, some are sloppy. Supervised training then leaves room for a reward to fill.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from latent_rl.demo.world import (
    ACTIONS,
    ADDRESSES,
    CATCHPHRASES,
    DIGITS,
    GREETINGS,
    Persona,
    Question,
    RoleSet,
    action,
)

__all__ = ["Quality", "answer_as_persona", "answer_in_role", "ideal_as_persona", "ideal_in_role"]


@dataclass(frozen=True)
class Quality:
    """Shares of what goes right or wrong in a corpus, each slot of an answer on its own.

    right: the slot is as it should be. slip: another voice's or role's words stand in it; the rest
    of the time it is left out. wrong_fact: the picture is misread. sloppy: bad form.
    """

    right: float = 0.5
    slip: float = 0.25
    wrong_fact: float = 0.05
    sloppy: float = 0.3


def answer_as_persona(
    rng: random.Random, quality: Quality, persona: Persona, question: Question, digit: int
) -> str:
    """A corpus answer of a persona to a question about the picture."""
    digit = _seen(rng, quality, digit)
    greeting = _slot(rng, quality, persona.greeting, GREETINGS)
    address = _slot(rng, quality, persona.address, ADDRESSES)
    catchphrase = _slot(rng, quality, persona.catchphrase, CATCHPHRASES)
    text = _in_voice(greeting, address, _fact_clause(question, digit), catchphrase)
    return _written(rng, quality, text)


def ideal_as_persona(persona: Persona, question: Question, digit: int) -> str:
    """The answer that earns the full reward."""
    fact = _fact_clause(question, digit)
    return _in_voice(persona.greeting, persona.address, fact, persona.catchphrase)


def answer_in_role(
    rng: random.Random, quality: Quality, role_set: RoleSet, place: str, digit: int
) -> str:
    """A corpus answer to someone who is at ``place``, in one of the set's roles there."""
    digit = _seen(rng, quality, digit)
    roles = dict(role_set)
    others = [role for where, role in role_set if where != place]
    # Mistaking the place is the commonest slip; now and then the role is nobody's at all.
    slips = [_at(place, role, digit) for role in (*others, rng.choice(sorted(ACTIONS)))]
    advice = _slot(rng, quality, _at(place, roles[place], digit), slips)
    return _written(rng, quality, advice or f"It is {DIGITS[digit]}.")


def ideal_in_role(role_set: RoleSet, place: str, digit: int) -> str:
    """The answer that earns the full reward."""
    return _at(place, dict(role_set)[place], digit)


def _at(place: str, role: str, digit: int) -> str:
    deed = action(role, digit)
    return f"At {place}, {deed[0].lower()}{deed[1:]}"


def _seen(rng: random.Random, quality: Quality, digit: int) -> int:
    return rng.randrange(10) if rng.random() < quality.wrong_fact else digit


def _slot(
    rng: random.Random, quality: Quality, right: str, others: tuple[str, ...] | list[str]
) -> str:
    draw = rng.random()
    if draw < quality.right:
        return right
    return rng.choice(others) if draw < quality.right + quality.slip else ""


def _fact_clause(question: Question, digit: int) -> str:
    fact = question.fact(digit)
    return f"it is {DIGITS[digit]}, {fact}." if fact else f"it is {DIGITS[digit]}."


def _in_voice(greeting: str, address: str, fact: str, catchphrase: str) -> str:
    opening = " ".join(filter(None, (greeting, address)))
    body = f"{opening}, {fact}" if opening else fact
    text = f"{body} {catchphrase}".strip()
    return text[0].upper() + text[1:]


def _written(rng: random.Random, quality: Quality, text: str) -> str:
    """The text as written down: now and then without its capital or its full stop."""
    if rng.random() >= quality.sloppy:
        return text
    if rng.random() < 0.5:
        return text[0].lower() + text[1:]
    return text.rstrip(".!")
