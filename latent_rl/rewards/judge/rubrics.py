"""Rubrics: what a judge is asked about, on which scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["MMROLE", "PCOGALIGN", "RUBRICS", "Dimension", "Rubric"]


@dataclass(frozen=True)
class Dimension:
    """One thing to score: a name of lower-case words with underscores, and what it asks."""

    name: str
    question: str


@dataclass(frozen=True)
class Rubric:
    """Dimensions scored on one scale.

    name, version  part of the cache's key: change the version with the meaning
    task           what the responses were meant to do, shown to the judge
    dimensions     each scored for itself; a judgement's value is their mean
    low, high      ends of the scale; fractions between are allowed
    columns        dataset columns shown to the judge where a row has them
    """

    name: str
    version: str
    task: str
    dimensions: tuple[Dimension, ...]
    low: float
    high: float
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [dimension.name for dimension in self.dimensions]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"Rubric: dimensions must be at least one and distinct, got {names}")
        if not self.low < self.high:
            raise ValueError(f"Rubric: need low < high, got {self.low}, {self.high}")

    def only(self, names: Iterable[str]) -> Rubric:
        """The rubric with the named dimensions alone, in their order here.

        Raises:
            ValueError: for a name it does not have.
        """
        wanted = list(names)
        known = [dimension.name for dimension in self.dimensions]
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise ValueError(
                f"rubric {self.name}: no dimension {', '.join(unknown)}; known are "
                f"{', '.join(known)}"
            )
        kept = tuple(d for d in self.dimensions if d.name in wanted)
        return dataclasses.replace(self, dimensions=kept)

    def share(self, score: float) -> float:
        """A score as a share of the scale, in [0, 1]."""
        return (score - self.low) / (self.high - self.low)


MMROLE = Rubric(
    name="mmrole",
    version="1",
    task=(
        "The assistant plays a character and talks about the image with the tone, manner and "
        "vocabulary of that character."
    ),
    dimensions=(
        Dimension(
            "instruction_adherence",
            "Does it speak as the character alone, without explanations or remarks from outside "
            "the role?",
        ),
        Dimension("fluency", "Is it grammatical and smooth?"),
        Dimension(
            "coherency",
            "Does it keep the thread of the dialogue and contradict nothing established before?",
        ),
        Dimension("image_text_relevance", "Is it closely about what the image shows?"),
        Dimension(
            "response_accuracy",
            "Does it answer what the other speaker said, or open a fitting talk about the image?",
        ),
        Dimension(
            "personality_consistency", "Does it show the character's personality, and enough of it?"
        ),
        Dimension(
            "knowledge_consistency",
            "Does it agree with what the character would know: experience, abilities, "
            "relationships?",
        ),
        Dimension(
            "tone_consistency",
            "Is its tone the character's way of speaking throughout, and not that of an AI "
            "assistant?",
        ),
    ),
    low=1,
    high=10,
    columns=("character", "profile"),
)
"""The eight dimensions of MMRole-Eval (arXiv 2408.04203), its scale of 1 to 10, in our words. The
benchmark asks one request per dimension; this asks all in one."""

PCOGALIGN = Rubric(
    name="pcogalign",
    version="1",
    task=(
        "The assistant answers a question that a person asks in the situation of the image. The "
        "person has the roles given, and wants to reach the bodily behaviour and the state of mind "
        "described."
    ),
    dimensions=(
        Dimension(
            "role_set_awareness",
            "Does it consider the person's roles, above all the one that matters here, and leave "
            "out those that do not?",
        ),
        Dimension(
            "body_behaviour_awareness",
            "Does it give guidance that leads to the bodily behaviour the person wants?",
        ),
        Dimension(
            "mind_feelings_awareness",
            "Does it meet the emotional needs behind the feelings the person wants?",
        ),
        Dimension(
            "contextual_awareness",
            "Does it answer the question itself, in this place and situation?",
        ),
        Dimension(
            "conversational_flow",
            "Does it read naturally, invite going on, and have the right length?",
        ),
    ),
    low=1,
    high=5,
    columns=("role_set", "location", "eval_help"),
)
"""The five dimensions of PCogAlignBench, its scale of 1 to 5, in our words. Its evaluation code
calls the first one Role-Set Sensitivity."""

RUBRICS: Mapping[str, Rubric] = {rubric.name: rubric for rubric in (MMROLE, PCOGALIGN)}
