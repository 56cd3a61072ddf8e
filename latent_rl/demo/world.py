"""The miniature world of the demo: digits, personas, and roles at places."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import permutations, product

__all__ = [
    "ACTIONS",
    "ADDRESSES",
    "CATCHPHRASES",
    "DIGITS",
    "GREETINGS",
    "PARITIES",
    "PLACES",
    "QUESTIONS",
    "SIZES",
    "Persona",
    "Question",
    "RoleSet",
    "action",
    "personas",
    "role_sets",
]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PARITIES = ("even", "odd")
SIZES = ("small", "large")

GREETINGS = (
    "Ahoy", "Howdy", "Greetings", "Bonjour", "Hello", "Salute", "Hola", "Aloha", "Servus",
    "Namaste",
)  # fmt: skip
ADDRESSES = (
    "captain", "partner", "friend", "professor", "darling", "boss", "majesty", "mate", "doctor",
    "neighbour",
)  # fmt: skip
CATCHPHRASES = (
    "Blow me down!", "Yeehaw!", "Live long!", "Magnifique!", "Elementary!", "Full steam ahead!",
    "Stay golden!", "By my beard!", "What a day!", "To the stars!",
)  # fmt: skip
_NAMES = (
    "Zora", "Milo", "Ines", "Otto", "Vera", "Hugo", "Lena", "Tariq", "Yuki", "Bruno", "Freya",
    "Kofi",
)  # fmt: skip

PLACES = ("home", "school")
# What a role makes of a digit; no two actions share their verb.
ACTIONS = {
    "teacher": "Write {digit} on the board.",
    "cook": "Add {digit} spoons of salt.",
    "driver": "Stop at gate {digit}.",
    "gardener": "Plant {digit} trees.",
    "nurse": "Visit room {digit}.",
    "cashier": "Count {digit} coins.",
    "runner": "Run {digit} laps.",
    "musician": "Play {digit} notes.",
    "painter": "Mix {digit} colours.",
    "parent": "Tell {digit} stories.",
}


@dataclass(frozen=True)
class Question:
    """A question about a picture; ``asks`` names the fact beside the digit, if any."""

    text: str
    asks: str

    def fact(self, digit: int) -> str | None:
        """What to say beside the digit's name: "even" or "odd", "small" or "large", or nothing."""
        facts = {"parity": PARITIES[digit % 2], "size": SIZES[digit >= 5]}
        return facts.get(self.asks)


QUESTIONS = (
    Question("What digit is this?", "name"),
    Question("Which digit do you see?", "name"),
    Question("Is it even or odd?", "parity"),
    Question("Is it small or large?", "size"),
)


@dataclass(frozen=True)
class Persona:
    """A voice: how it greets, how it calls people, and what it always says."""

    name: str
    greeting: str
    address: str
    catchphrase: str

    def profile(self) -> dict[str, str]:
        """As a character profile of MMRole."""
        return {
            "introduction": f"Greets with {self.greeting}.",
            "personality": "",
            "experience": "",
            "relationship": f"Calls people {self.address}.",
            "catchphrase": self.catchphrase,
        }

    @classmethod
    def from_profile(cls, name: str, profile: dict[str, str]) -> Persona:
        """The persona a profile was written from."""
        greeting = profile["introduction"].removeprefix("Greets with ").removesuffix(".")
        address = profile["relationship"].removeprefix("Calls people ").removesuffix(".")
        return cls(name, greeting, address, profile["catchphrase"])


RoleSet = tuple[tuple[str, str], ...]
"""(place, role) pairs of one user."""


def personas(seed: int, train: int, held_out: int) -> tuple[list[Persona], list[Persona]]:
    """Personas to train on and held-out ones: combinations never seen, of words all seen.

    Raises:
        ValueError: when more are asked for than there are combinations.
    """
    combinations = list(product(GREETINGS, ADDRESSES, CATCHPHRASES))
    if train + held_out > len(combinations):
        raise ValueError(f"personas: at most {len(combinations)} in all, got {train} + {held_out}")
    rng = random.Random(seed)
    rng.shuffle(combinations)
    made = [Persona(rng.choice(_NAMES), *words) for words in combinations[: train + held_out]]
    return made[:train], made[train:]


def role_sets(seed: int, train: int, held_out: int) -> tuple[list[RoleSet], list[RoleSet]]:
    """Sets of a role at every place, to train on and held out; every role occurs in both.

    Raises:
        ValueError: when more are asked for than there are sets.
    """
    made = [tuple(zip(PLACES, roles, strict=True)) for roles in permutations(ACTIONS, len(PLACES))]
    if train + held_out > len(made):
        raise ValueError(f"role_sets: at most {len(made)} in all, got {train} + {held_out}")
    random.Random(seed).shuffle(made)
    return made[:train], made[train : train + held_out]


def action(role: str, digit: int) -> str:
    """What someone in a role does with the digit."""
    return ACTIONS[role].format(digit=DIGITS[digit])
