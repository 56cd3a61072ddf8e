"""What a person wants to read of a rollout: prompts, completions, codes and rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

if TYPE_CHECKING:
    from latent_rl.train.rollout import Rollout

__all__ = ["BatchRecord", "RolloutRecord", "prompt_text"]


@dataclass(frozen=True)
class RolloutRecord:
    """B completions in words, as plain values.

    seeds        row seeds, which name the rows of the replay
    prompts      as `prompt_text` writes them
    completions  decoded texts
    codes        the codes of each completion
    rewards      weighted sums; None where the sample was dropped
    scores       one list of B per reward function; None where it does not apply or failed
    """

    seeds: list[int]
    prompts: list[str]
    completions: list[str]
    codes: list[list[int]]
    rewards: list[float | None]
    scores: dict[str, list[float | None]]

    @classmethod
    def of(cls, rollout: Rollout) -> Self:
        """Return the record of a rollout (one read back of what the updates do not need)."""
        columns = rollout.per_function.T.tolist()
        return cls(
            seeds=rollout.seeds.tolist(),
            prompts=[prompt_text(row["prompt"]) for row in rollout.rows],
            completions=list(rollout.texts),
            codes=[[code for code in row if code >= 0] for row in rollout.codes.tolist()],
            rewards=_numbers(rollout.rewards.tolist()),
            scores=dict(zip(rollout.names, map(_numbers, columns), strict=True)),
        )

    def __len__(self) -> int:
        return len(self.seeds)

    def row(self, index: int) -> dict[str, Any]:
        """Return one completion."""
        return {
            "prompt": self.prompts[index],
            "completion": self.completions[index],
            "codes": self.codes[index],
            "reward": self.rewards[index],
            "rewards": {name: values[index] for name, values in self.scores.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the record that `state_dict` was taken of."""
        return cls(**state)


@dataclass(frozen=True)
class BatchRecord:
    """A micro-batch of the updates, without its states.

    tensors  what it holds per row and token: codes, masks, advantages, log-probabilities, seeds
             (which repeat the rollout)
    words    the rollout it comes from, or None if that is not known
    """

    tensors: dict[str, Tensor]
    words: RolloutRecord | None

    @classmethod
    def of(cls, batch: Any, words: RolloutRecord | None) -> Self:
        """Return the record of a batch of the replay."""
        values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        small = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.ndim <= 2}
        return cls(small, words)

    def in_words(self) -> dict[str, Any]:
        """Return the rows for JSON."""
        advantages = self.tensors["advantages"].tolist()
        rows: list[dict[str, Any]] = [{} for _ in advantages]
        if self.words is not None:
            known = {seed: row for row, seed in enumerate(self.words.seeds)}
            rows = [self.words.row(known[seed]) for seed in self.tensors["seeds"].tolist()]
        return {
            "rows": [
                {**row, "advantage": advantage}
                for row, advantage in zip(rows, advantages, strict=True)
            ]
        }


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a prompt as "role: text" lines, an image as <image>."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role')}: {_content(turn.get('content'))}" for turn in prompt)


def _content(content: Any) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    parts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text", "") if isinstance(part, Mapping) else str(part)
        parts.append(text if kind == "text" else f"<{kind}>")
    return " ".join(parts)


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [None if value != value else value for value in values]
