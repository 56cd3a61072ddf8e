"""What an evaluation leaves: every answer and every reward, as one JSON file.

All numbers of tables and reports are computed from this record (:mod:`latent_rl.eval.summary`), so
anything can be computed again, or otherwise, without the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latent_rl.eval.answering import Answer, Sampling
from latent_rl.eval.code_tokens import CodeExample, CodeUse, TokenLift
from latent_rl.eval.world_model import WorldModelReport
from latent_rl.eval.writing import write_json

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "CodeEffect",
    "Evaluation",
    "EvaluationSettings",
    "PromptRecord",
    "RewardRecord",
    "ScoredAnswer",
    "SplitRecord",
    "load_evaluation",
    "save_evaluation",
]

SCHEMA = "latent-rl/evaluation"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EvaluationSettings:
    """How an evaluation asks.

    Attributes:
        samples: M answers per prompt at ``temperature``; diversity needs at least 2.
        temperature: of the sampled answers, > 0.
        greedy: also ask once at temperature 0.
        max_new_tokens: longest answer.
        seed: of the answers.
        batch_prompts: prompts asked at once; changes no answer.
        shown: conversations per split that keep thumbnails of their images.
    """

    samples: int = 8
    temperature: float = 1.0
    greedy: bool = True
    max_new_tokens: int = 128
    seed: int = 0
    batch_prompts: int = 8
    shown: int = 8

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("batch_prompts", 1), ("shown", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"EvaluationSettings: {name} must be >= {least}, got {getattr(self, name)}"
                )
        if not self.temperature > 0:
            raise ValueError(
                f"EvaluationSettings: temperature must be > 0, got {self.temperature} "
                "(temperature 0 is `greedy`)"
            )
        Sampling(self.temperature, self.max_new_tokens)


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer and its rewards.

    Attributes:
        answer: what was said.
        scores: per reward function; None where it does not apply or failed.
        reward: the weighted sum; None where the sample was dropped.
        failed: a reward function failed on it, so it counts nowhere.
    """

    answer: Answer
    scores: tuple[float | None, ...]
    reward: float | None
    failed: bool = False


@dataclass(frozen=True)
class PromptRecord:
    """One prompt and all its answers.

    Attributes:
        fingerprint: digest of prompt, images' pixels and the columns that rewards read.
        prompt: the text of its turns.
        samples: M answers. greedy: the answer at temperature 0, or None.
        similarity: mean pairwise cosine of the samples' embeddings, or None.
        thumbnails: images as data URIs, for the conversations that are shown.
    """

    fingerprint: str
    prompt: str
    samples: tuple[ScoredAnswer, ...]
    greedy: ScoredAnswer | None = None
    similarity: float | None = None
    thumbnails: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitRecord:
    """The prompts of one split, in order."""

    prompts: tuple[PromptRecord, ...]

    @property
    def fingerprint(self) -> str:
        """Equal for the same prompts in the same order."""
        text = "\n".join(prompt.fingerprint for prompt in self.prompts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RewardRecord:
    """One reward function; ``fingerprint`` is a digest of its code and settings."""

    name: str
    weight: float
    fingerprint: str


@dataclass(frozen=True)
class CodeEffect:
    """What a code does on given states: the tokens whose probability it raises most.

    Attributes:
        code: its id.
        tokens: as text, most raised first.
        raised: per token, mean p(token | state, code) - p(token | state).
    """

    code: int
    tokens: tuple[str, ...]
    raised: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """One answerer on its splits.

    Attributes:
        name: the answerer's. num_codes: K or None. details: checkpoint and options.
        settings: how it was asked. rewards: in the order of ``ScoredAnswer.scores``.
        splits: by name; "test" is in distribution, "ood" out of it.
        errors: what rewards reported, each message once.
        encoder: name of the sentence encoder behind ``similarity``, or None.
        code_uses: what each code said in the sampled answers.
        code_effects: what each code does on held-out conversations, where there were any.
        world_model: cross-entropies on held-out conversations, by split.
        created: UTC time. seconds: of answering and scoring. versions: of the libraries.
    """

    name: str
    num_codes: int | None
    details: Mapping[str, Any]
    settings: EvaluationSettings
    rewards: tuple[RewardRecord, ...]
    splits: Mapping[str, SplitRecord]
    errors: tuple[str, ...] = ()
    encoder: str | None = None
    code_uses: tuple[CodeUse, ...] = ()
    code_effects: tuple[CodeEffect, ...] = ()
    world_model: Mapping[str, WorldModelReport] = field(default_factory=dict)
    created: str = ""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write the record, whole or not at all."""
    values = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION}
    write_json(path, values | dataclasses.asdict(evaluation), compact=True)


def load_evaluation(path: Path) -> Evaluation:
    """Read a record.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is none, is damaged, or has another schema version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such evaluation")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no evaluation, not JSON: {error}") from error
    if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path}: no evaluation of latent-rl")
    version = values.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: evaluation of schema version {version}, this version reads {SCHEMA_VERSION}"
        )
    try:
        return _evaluation(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged evaluation: {type(error).__name__}: {error}") from error


def _evaluation(values: dict[str, Any]) -> Evaluation:
    rewards = tuple(RewardRecord(**reward) for reward in values["rewards"])
    splits = {
        name: SplitRecord(tuple(_prompt(prompt, len(rewards)) for prompt in split["prompts"]))
        for name, split in values["splits"].items()
    }
    worlds = {name: WorldModelReport(**world) for name, world in values["world_model"].items()}
    effects = tuple(
        CodeEffect(effect["code"], tuple(effect["tokens"]), tuple(effect["raised"]))
        for effect in values["code_effects"]
    )
    read = {
        "settings": EvaluationSettings(**values["settings"]),
        "rewards": rewards,
        "splits": splits,
        "errors": tuple(values["errors"]),
        "code_uses": tuple(_code_use(use) for use in values["code_uses"]),
        "code_effects": effects,
        "world_model": worlds,
    }
    return Evaluation(**{**values, **read})


def _prompt(values: dict[str, Any], rewards: int) -> PromptRecord:
    greedy = values["greedy"]
    read = {
        "samples": tuple(_scored(sample, rewards) for sample in values["samples"]),
        "greedy": None if greedy is None else _scored(greedy, rewards),
        "thumbnails": tuple(values["thumbnails"]),
    }
    return PromptRecord(**{**values, **read})


def _scored(values: dict[str, Any], rewards: int) -> ScoredAnswer:
    answer = values["answer"]
    ids = {name: tuple(answer[name]) for name in ("tokens", "codes")}
    scores = tuple(values["scores"])
    if len(scores) != rewards:
        raise ValueError(f"{len(scores)} scores for {rewards} rewards")
    return ScoredAnswer(Answer(**{**answer, **ids}), scores, values["reward"], values["failed"])


def _code_use(values: dict[str, Any]) -> CodeUse:
    return CodeUse(
        values["code"],
        values["count"],
        tuple(TokenLift(**token) for token in values["tokens"]),
        tuple(CodeExample(**example) for example in values["examples"]),
    )
