"""A rollout as the updates see it, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import Tensor, nn

from latent_rl.models import Trace

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel
    from latent_rl.nn import LatentPolicy

__all__ = ["ActionOutputs", "Replay", "action_logits", "action_outputs"]

FORMAT = 1


@dataclass(frozen=True)
class Replay:
    """B completions of at most T tokens as the updates see them.

    The backbone is frozen under RL, so the states of the rollout are the input of every update:
    policy and reference each run only their small tower on them. Every field that is a tensor has
    one entry per row on its first axis, and `select` and `state` treat it so.

    trace         hidden [B, L, H] holds the policy's input states (projected where text-only)
    first         position of the action that explains completion token 0 (prompt length - 1)
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

    trace: Trace
    first: int
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

    def select(self, rows: Tensor) -> Replay:
        """Return the given rows (int64 [R])."""
        tensors: dict[str, Any] = {n: value[rows] for n, value in self._tensors().items()}
        return dataclasses.replace(self, trace=self.trace.select(rows), **tensors)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the whole replay as a flat dict of contiguous CPU tensors and a dict for JSON."""
        tensors = {**self._tensors(), **_trace_tensors(self.trace)}
        meta = {"format": FORMAT, "first": self.first}
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, meta

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], model: LatentActionModel
    ) -> Self:
        """Return the replay `state` was taken of, on the model's device.

        Raises:
            ValueError: a state of another format, or with missing tensors.
        """
        if meta.get("format") != FORMAT:
            raise ValueError(f"Replay: format must be {FORMAT}, got {meta.get('format')!r}")
        here = {name: value.to(model.device) for name, value in tensors.items()}
        rows = {name: value for name, value in here.items() if "." not in name}
        try:
            return cls(trace=_trace_of(here), first=int(meta["first"]), **rows)
        except (KeyError, TypeError) as error:
            raise ValueError(f"Replay: the state lacks or has too much: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class ActionOutputs(NamedTuple):
    """logits [B, T, K] and values [B, T] (None without a value head) at the actions of a replay."""

    logits: Tensor
    values: Tensor | None


def action_outputs(
    policy: LatentPolicy, replay: Replay, value_head: nn.Module | None = None
) -> ActionOutputs:
    """Run the policy's tower once on a replay; the value head ([..., H] -> [...]) reads its output
    too."""
    features = policy.features(replay.trace.hidden, replay.trace.tower_kwargs)
    features = features[:, replay.first : replay.first + replay.codes.shape[1]]
    values = None if value_head is None else value_head(features)
    return ActionOutputs(policy.logits(features), values)


def action_logits(policy: LatentPolicy, replay: Replay) -> Tensor:
    """Return the policy's logits [B, T, K] at the action positions of a replay."""
    return action_outputs(policy, replay).logits


def _trace_tensors(trace: Trace) -> dict[str, Tensor]:
    flat = {
        "trace.hidden": trace.hidden,
        "trace.keep_mask": trace.keep_mask,
        "trace.text_only": trace.text_only,
    }
    for name, value in trace.tower_kwargs.items():
        parts = value if isinstance(value, Mapping) else {"": value}
        for kind, part in parts.items():
            if isinstance(part, Tensor):
                flat[f"trace.kwargs.{name}.{kind}"] = part
    return flat


def _trace_of(tensors: Mapping[str, Tensor]) -> Trace:
    kwargs: dict[str, Any] = {}
    for key, value in tensors.items():
        if key.startswith("trace.kwargs."):
            name, kind = key.removeprefix("trace.kwargs.").split(".", 1)
            if kind:
                kwargs.setdefault(name, {})[kind] = value
            else:
                kwargs[name] = value
    return Trace(
        tensors["trace.hidden"], kwargs, tensors["trace.keep_mask"], tensors["trace.text_only"]
    )
