"""Hidden-state replay: everything an update needs of a rollout, without the vision-language
model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latent_rl.models import Trace

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel
    from latent_rl.nn import LatentPolicy

__all__ = ["Replay", "action_logits", "join_traces"]


@dataclass(frozen=True)
class Replay:
    """B completions of at most T tokens as the updates see them.

    The backbone is frozen under RL, so the states of the rollout are the input of every update:
    policy and reference each run only their small tower on them.

    trace         hidden [B, L, H] holds the policy's input states (projected where text-only)
    first         position of the action that explains completion token 0 (prompt length - 1)
    codes         [B, T] int64; -1 where there is no token
    keep_mask     [B, T] bool; True where a token takes part in the loss
    advantages    [B]
    seeds         [B] int64 row seeds: `generate` with them repeats the rollout
    old_logprobs  [B, T] under the policy that sampled, or None while no update has been made since
    support       [B, T, K] bool, codes that could be drawn, or None without truncation
    ref_logits    [B, T, K] of the reference policy, or None without a KL term
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

    def __len__(self) -> int:
        return self.codes.shape[0]

    def select(self, rows: Tensor) -> Replay:
        """Return the given rows (int64 [R])."""
        return dataclasses.replace(
            self,
            trace=self.trace.select(rows),
            codes=self.codes[rows],
            keep_mask=self.keep_mask[rows],
            advantages=self.advantages[rows],
            seeds=self.seeds[rows],
            old_logprobs=_rows_or_none(self.old_logprobs, rows),
            support=_rows_or_none(self.support, rows),
            ref_logits=_rows_or_none(self.ref_logits, rows),
        )


def _rows_or_none(value: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if value is None else value[rows]


def action_logits(policy: LatentPolicy, replay: Replay) -> Tensor:
    """Return the policy's logits [B, T, K] at the action positions of a replay."""
    logits: Tensor = policy(replay.trace.hidden, replay.trace.tower_kwargs)
    return logits[:, replay.first : replay.first + replay.codes.shape[1]]


def replay_trace(model: LatentActionModel, trace: Trace, dtype: torch.dtype | None) -> Trace:
    """Return the trace with the policy's input states in it, in the dtype to keep."""
    state = model.state(trace)
    return trace.with_hidden(state if dtype is None else state.to(dtype))


def join_traces(
    traces: Sequence[Trace], prompt_lengths: Sequence[int], steps: Sequence[int]
) -> Trace:
    """Join traces of rollouts with different prompt lengths P_i and lengths T_i into one batch.

    Each is [B_i, P_i + T_i - 1]; prompts stay right-aligned, so the joined action positions start
    at max(P) - 1.

    Raises:
        ValueError: decoders that prepare attention masks of their own (Gemma3).
    """
    if len(traces) == 1:
        return traces[0]
    longest_prompt, longest = max(prompt_lengths), max(steps)
    pads = [
        (longest_prompt - prompt, longest - step)
        for prompt, step in zip(prompt_lengths, steps, strict=True)
    ]
    kwargs: dict[str, Tensor] = {
        "attention_mask": torch.cat(
            [nn.functional.pad(_plain_mask(t), pad) for t, pad in zip(traces, pads, strict=True)]
        )
    }
    given = [t.tower_kwargs.get("position_ids") for t in traces]
    known = [positions for positions in given if positions is not None]
    if known:
        most_axes = max(known, key=lambda positions: positions.ndim)
        positions = [_positions(trace, like=most_axes) for trace in traces]
        kwargs["position_ids"] = torch.cat(
            [nn.functional.pad(p, pad) for p, pad in zip(positions, pads, strict=True)], dim=-2
        )
    hidden = [
        nn.functional.pad(trace.hidden, (0, 0, *pad))
        for trace, pad in zip(traces, pads, strict=True)
    ]
    keep = [nn.functional.pad(t.keep_mask, pad) for t, pad in zip(traces, pads, strict=True)]
    return Trace(
        torch.cat(hidden), kwargs, torch.cat(keep), torch.cat([trace.text_only for trace in traces])
    )


def _plain_mask(trace: Trace) -> Tensor:
    mask = trace.tower_kwargs.get("attention_mask")
    if not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ValueError(
            "join_traces: this decoder prepares its own attention masks; set dynamic_sampling=False"
        )
    return mask


def _positions(trace: Trace, *, like: Tensor) -> Tensor:
    """Position ids [B, L] or [A, B, L] with the axes of `like`.

    A decoder that was given none counts from 0 (Qwen2.5-VL for a batch without images).
    """
    own = trace.tower_kwargs.get("position_ids")
    batch, length = trace.hidden.shape[:2]
    if own is None:
        own = torch.arange(length, device=trace.hidden.device)
    return own.expand(*like.shape[:-2], batch, length)
