"""How many bytes a call will hold, counted from shapes before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from latent_rl.decode.casts import casts_bytes
from latent_rl.decode.slot_cache import SlotLayout, layer_shapes
from latent_rl.models import LatentActionModel

__all__ = ["DecodePlan", "make_plan"]

# Of what reading prompts may hold for a moment, where no number of prompts is given: this share of
# the caches, and what is little beside any model's caches.
_PREFILL_SHARE = 4
_LEAST_PREFILL_BYTES = 64 << 20


@dataclass(frozen=True)
class DecodePlan:
    """Bytes by purpose.

    Attributes:
        weights_bytes: parameters and buffers of the model, held anyway.
        cache_bytes: key-value storage of trunk and policy for prompts and slots.
        tables_bytes: what merging adds for each code, made once per call.
        results_bytes: tokens, codes and their numbers.
        replay_bytes: states kept for replay.
        prefill_bytes: keys, values, masks and the widest layer's activations of the prompts read
            together, held while they are read; a vision tower's own activations are not in it.
        prefill_prompts: prompts read together, at most. No bytes.
        casts_bytes: float32 weights in autocast's dtype, where the call is under one.
    """

    weights_bytes: int
    cache_bytes: int
    tables_bytes: int
    results_bytes: int
    replay_bytes: int
    prefill_bytes: int
    prefill_prompts: int
    casts_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.new_bytes

    @property
    def new_bytes(self) -> int:
        """What a first call allocates on top of the weights."""
        kept = self.cache_bytes + self.tables_bytes + self.results_bytes + self.replay_bytes
        return kept + self.casts_bytes + self.prefill_bytes

    def check(self, device: torch.device, held: int = 0) -> None:
        """Raise when the device has less memory free than the call needs.

        Args:
            device: checked when it is a CUDA device.
            held: bytes that an earlier call holds and this one will use again or free.

        Raises:
            MemoryError: naming the parts and what to lower.
        """
        if device.type != "cuda":
            return
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        self.fit(free + idle + held)

    def fit(self, available_bytes: int) -> None:
        """Raise when ``available_bytes`` are fewer than :attr:`new_bytes`.

        Raises:
            MemoryError: naming the parts and what to lower.
        """
        if self.new_bytes <= available_bytes:
            return
        advice = [
            (self.cache_bytes, f"slots or max_new_tokens (caches: {_gib(self.cache_bytes)})"),
            (
                self.replay_bytes,
                f"requests per call, or return_hidden or hidden_dtype "
                f"(replay: {_gib(self.replay_bytes)})",
            ),
            (self.tables_bytes, f"the number of codes (tables: {_gib(self.tables_bytes)})"),
            (self.prefill_bytes, f"prefill_prompts (prefill: {_gib(self.prefill_bytes)})"),
            (self.results_bytes, f"requests per call (results: {_gib(self.results_bytes)})"),
        ]
        lower = "; ".join(text for part, text in sorted(advice, reverse=True) if part)
        raise MemoryError(
            f"Decoder: needs {_gib(self.new_bytes)} besides the weights, "
            f"{_gib(available_bytes)} are free. Lower {lower}"
        )


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"


def _tables_bytes(model: LatentActionModel) -> int:
    """Of ``LatentActionModel.merge_tables``: [2, K, I] per block."""
    blocks = model.latent.merge.blocks
    weight: torch.Tensor = cast(Any, blocks[0]).w_gate
    item = max(weight.dtype.itemsize, torch.float32.itemsize)
    return len(blocks) * 2 * model.latent_config.num_codes * weight.shape[0] * item


def _prefill_token_bytes(model: LatentActionModel, cached: int, prompt_tokens: int) -> int:
    """What reading a prompt's token holds: its keys and values, the widest layer, its mask row."""
    config: Any = model.decoder.config
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    # The residual, its norm and two more of its width; gate, up and their product.
    return cached + (4 * hidden + 3 * inner + prompt_tokens) * model.dtype.itemsize


def make_plan(
    model: LatentActionModel,
    *,
    layout: SlotLayout,
    requests: int,
    prompt_tokens: int,
    new_tokens: int,
    hidden_dtype: torch.dtype | None,
    prefill_prompts: int | None = None,
) -> DecodePlan:
    """Count; see ``Decoder.plan``.

    Without ``prefill_prompts`` as many prompts are read together as hold a quarter of the bytes of
    the caches, or 64 MiB where that is more, while they are read.

    Raises:
        ValueError: for layers without a static cache.
    """
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    policy = model.latent.policy
    width = sum(s.width for s in layer_shapes(model.decoder)) * model.dtype.itemsize
    width += sum(s.width for s in layer_shapes(policy.tower)) * policy.head.weight.dtype.itemsize
    rows = requests + 1
    hidden = 0
    if hidden_dtype is not None:
        states = rows * (prompt_tokens + new_tokens - 1)
        hidden = states * int(model.decoder.config.hidden_size) * hidden_dtype.itemsize
    cache = layout.positions * width
    prompt = prompt_tokens * _prefill_token_bytes(model, width, prompt_tokens)
    if prefill_prompts is None:
        prefill_prompts = max(cache // _PREFILL_SHARE, _LEAST_PREFILL_BYTES) // prompt
    together = min(max(prefill_prompts, 1), layout.prompts)
    return DecodePlan(
        weights_bytes=weights,
        cache_bytes=cache,
        tables_bytes=_tables_bytes(model),
        results_bytes=rows * new_tokens * (2 * 8 + 3 * 4),
        replay_bytes=hidden,
        prefill_bytes=together * prompt,
        prefill_prompts=together,
        casts_bytes=casts_bytes(model) if model.is_active else 0,
    )
