"""Traces of rollouts on their way into a replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latent_rl.models import Trace

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["join_traces", "replay_trace"]


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
