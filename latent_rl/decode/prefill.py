"""Reading prompts: each once, however many completions follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from latent_rl.decode.prompts import Prompt, join_prompts
from latent_rl.decode.slot_cache import CachedRow
from latent_rl.models import LatentActionModel, Trace
from latent_rl.models import backbone as bb

__all__ = ["Prefill", "prefill"]


@dataclass(frozen=True)
class Prefill:
    """What a prompt of L tokens leaves behind.

    Attributes:
        trunk, policy: keys and values; the policy's is None for the base model.
        hidden: [1, L, H], the trunk's states.
        state: [1, H], the last one, projected where the prompt has no image.
        policy_logits: float32 [1, K], or None.
        positions: int64 [P, 1, L], rotary positions, P per token.
        masks: the decoder's attention masks by layer kind where it was given such, else None.
        windows: of those kinds that see a sliding window, its width.
        text_only: bool [1].
    """

    trunk: CachedRow | None
    policy: CachedRow | None
    hidden: Tensor
    state: Tensor
    policy_logits: Tensor | None
    positions: Tensor
    masks: Mapping[str, Tensor | None] | None
    windows: Mapping[str, int]
    text_only: Tensor

    @property
    def length(self) -> int:
        """L."""
        return self.positions.shape[2]

    def without_cache(self) -> Prefill:
        """The same, without what only decoding needs."""
        empty = self.hidden[:, :0]
        return replace(self, trunk=None, policy=None, hidden=empty)


def prefill(model: LatentActionModel, prompts: Sequence[Prompt], pad_id: int) -> list[Prefill]:
    """Run trunk and policy over prompts, in one batch where their images stack.

    Raises:
        ValueError: for inputs the architecture would misread.
    """
    batch = join_prompts(prompts, pad_id)
    if batch is None:
        return [read for prompt in prompts for read in prefill(model, [prompt], pad_id)]
    if len(prompts) > 1 and not hasattr(bb.trunk(model.backbone), "get_rope_index"):
        # As generate() does: positions count a row's own tokens, not the padding before them.
        counted = batch["attention_mask"].cumsum(1) - 1
        batch = {**batch, "position_ids": counted.clamp_min(0)}
    # Full-length layers for all: windows are the mask's business here.
    trunk = DynamicCache()
    trace = model.encode(batch, past_key_values=trunk)
    state = model.state(trace)
    policy, logits = None, None
    if model.is_active:
        policy = DynamicCache()
        logits = model.latent.policy(
            state, trace.tower_kwargs, past_key_values=policy, last_only=True
        )[:, 0]
    mask = trace.tower_kwargs.get("attention_mask")
    masks = mask if isinstance(mask, Mapping) else None
    positions = _positions(trace.tower_kwargs.get("position_ids"), trace)
    found = []
    for row, prompt in enumerate(prompts):
        pad = trace.hidden.shape[1] - prompt["input_ids"].shape[1]
        at = slice(row, row + 1)
        found.append(
            Prefill(
                trunk=CachedRow(trunk, row, pad),
                policy=None if policy is None else CachedRow(policy, row, pad),
                hidden=trace.hidden[at, pad:],
                state=state[at, -1],
                policy_logits=None if logits is None else logits[at],
                positions=positions[:, at, pad:],
                masks=masks and {kind: _own(m, row, pad) for kind, m in masks.items()},
                windows=_windows(model),
                text_only=trace.text_only[at],
            )
        )
    return found


def _own(mask: Tensor | None, row: int, pad: int) -> Tensor | None:
    """A row's part of a mask [B, 1, L, L], without padding."""
    return None if mask is None else mask[row : row + 1, :, pad:, pad:]


def _windows(model: LatentActionModel) -> dict[str, int]:
    window = getattr(model.decoder.config, "sliding_window", None)
    return {} if window is None else {"sliding_attention": int(window)}


def _positions(given: Any, trace: Trace) -> Tensor:
    """int64 [P, B, L] as the decoder used them."""
    hidden = trace.hidden
    if given is None:
        return torch.arange(hidden.shape[1], device=hidden.device).expand(1, *hidden.shape[:2])
    positions: Tensor = given if given.ndim == 3 else given[None]
    return positions.expand(-1, hidden.shape[0], -1)
