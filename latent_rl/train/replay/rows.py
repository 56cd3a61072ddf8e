"""A rollout as the updates see it, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from latent_rl.train.replay.archive import ReplayStates
from latent_rl.train.replay.attention import prepare_tower
from latent_rl.train.replay.packing import LAYOUTS, BatchStates, Layout

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel
    from latent_rl.nn import LatentPolicy

__all__ = ["ActionOutputs", "Replay", "ReplayBatch", "action_logits", "action_outputs"]

FORMAT = 2


@dataclass(frozen=True)
class ReplayRows:
    """Numbers of B completions of at most T tokens, row by row.

    Every field that is a tensor has one entry per row on its first axis and, where it has a second,
    one per step; `Replay` selects, cuts and saves them so, whatever a subclass adds.

    codes         [B, T] int64; -1 where there is no token
    keep_mask     [B, T] bool; True where a token takes part in the loss
    advantages    [B] or [B, T]
    seeds         [B] int64 row seeds: `generate` with them repeats the rollout
    old_logprobs  [B, T] under the policy that sampled, or None while no update has been made since
    support       [B, T, K] bool, codes that could be drawn, or None without truncation
    ref_logits    [B, T, K] of the reference policy, or None without a KL term
    old_values    [B, T] of the value head when the rollout was made, or None without one
    returns       [B, T] for the value head to regress on, or None without one
    """

    codes: Tensor
    keep_mask: Tensor
    advantages: Tensor
    seeds: Tensor
    old_logprobs: Tensor | None = None
    support: Tensor | None = None
    ref_logits: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return self.codes.shape[0]

    def row_tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name of its field."""
        fields = (field for field in dataclasses.fields(self) if field.metadata.get("rows", True))
        values = {field.name: getattr(self, field.name) for field in fields}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True)
class ReplayBatch(ReplayRows):
    """A micro-batch: numbers of its rows, and the tower's input.

    T is cut to the last kept step of these rows. `cells` int64 [M] says which of the B * T entries
    the M kept actions are.
    """

    states: BatchStates
    cells: Tensor = dataclasses.field(metadata={"rows": False})

    def spread(self, values: Tensor) -> Tensor:
        """[M, ...] of the kept actions -> [B, T, ...], zero elsewhere."""
        rows, steps = self.codes.shape
        whole = values.new_zeros(rows * steps, *values.shape[1:])
        return whole.index_copy(0, self.cells, values).view(rows, steps, *values.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Replay(ReplayRows):
    """Everything the updates need of a rollout, without the vision-language model.

    The backbone is frozen under RL, so the states of the rollout are the input of every update:
    policy and reference each run only their small tower on them.
    """

    states: ReplayStates
    layout: Layout = LAYOUTS["packed"]

    def batch(self, rows: Sequence[int] | Tensor) -> ReplayBatch:
        """Return the given rows as a micro-batch; completions of a group share their prompt."""
        numbers = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        kept = self._kept_steps(numbers)
        steps = max((row[-1] + 1 for row in kept if row), default=1)
        index = torch.tensor(numbers, device=self.codes.device)
        tensors: dict[str, Any] = {
            name: value[index] if value.ndim == 1 else value[index, :steps]
            for name, value in self.row_tensors().items()
        }
        order, groups = self.states.fetch(numbers, [_needed(row) for row in kept])
        cells = [place * steps + step for place in order for step in kept[place]]
        return ReplayBatch(
            **tensors,
            states=self.layout.lay_out(groups, [kept[place] for place in order]),
            cells=torch.tensor(cells, dtype=torch.int64, device=self.codes.device),
        )

    def prefetch(self, rows: Sequence[int]) -> None:
        """Begin to bring the rows that the next call of `batch` asks for."""
        self.states.prefetch(list(rows), [_needed(row) for row in self._kept_steps(list(rows))])

    def kept_counts(self) -> list[int]:
        """Last kept step of every row plus 1; 0 for rows that take no part."""
        return [row[-1] + 1 if row else 0 for row in self._kept_steps(range(len(self)))]

    def _kept_steps(self, rows: Sequence[int]) -> list[list[int]]:
        """Steps whose action takes part in the loss, row by row."""
        return [self._keep_table[row] for row in rows]

    @cached_property
    def _keep_table(self) -> list[list[int]]:
        # One copy to the host per replay, not one per micro-batch.
        return [[step for step, keep in enumerate(row) if keep] for row in self.keep_mask.tolist()]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the whole replay as a flat dict of contiguous CPU tensors and a dict for JSON."""
        states, meta = self.states.state()
        tensors = {**self.row_tensors(), **{f"states.{name}": t for name, t in states.items()}}
        flat = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        return flat, {"format": FORMAT, "layout": self.layout.name, "states": meta}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], model: LatentActionModel
    ) -> Self:
        """Return the replay `state` was taken of; states go where they were.

        Raises:
            ValueError: a state of another format, or with missing tensors.
        """
        if meta.get("format") != FORMAT:
            raise ValueError(f"Replay: format must be {FORMAT}, got {meta.get('format')!r}")
        rows: dict[str, Any] = {n: t.to(model.device) for n, t in tensors.items() if "." not in n}
        states = {n.removeprefix("states."): t for n, t in tensors.items() if "." in n}
        try:
            archive = ReplayStates.from_state(states, meta["states"], model)
            return cls(**rows, states=archive, layout=LAYOUTS[meta["layout"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"Replay: the state lacks or has too much: {error}") from error


def _needed(steps: Sequence[int]) -> int | None:
    """States behind the prompt that reach the last kept step; None for a row without any."""
    return steps[-1] if steps else None


class ActionOutputs(NamedTuple):
    """logits [B, T, K] and values [B, T] (None without a value head) at the kept actions of a
    micro-batch; zero elsewhere."""

    logits: Tensor
    values: Tensor | None


def action_outputs(
    policy: LatentPolicy, batch: ReplayBatch, value_head: nn.Module | None = None
) -> ActionOutputs:
    """Run the policy's tower once on a micro-batch, and the heads on what the kept actions read;
    the value head is [..., H] -> [...]."""
    states = batch.states
    if "packing" in states.tower_kwargs:
        prepare_tower(policy.tower)
    features = policy.features(states.hidden, states.tower_kwargs)
    features = features.flatten(0, 1).index_select(0, states.action)
    values = None if value_head is None else batch.spread(value_head(features))
    return ActionOutputs(batch.spread(policy.logits(features)), values)


def action_logits(policy: LatentPolicy, batch: ReplayBatch) -> Tensor:
    """Return the policy's logits [B, T, K] at the kept actions of a micro-batch; zero elsewhere."""
    return action_outputs(policy, batch).logits
