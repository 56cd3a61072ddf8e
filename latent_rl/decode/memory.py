"""How many bytes a call will hold, counted from shapes before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from latent_rl.decode.slot_cache import SlotLayout, layer_shapes
from latent_rl.models import LatentActionModel

__all__ = ["DecodePlan", "make_plan"]


@dataclass(frozen=True)
class DecodePlan:
    """Bytes by purpose.

    Attributes:
        weights_bytes: parameters and buffers of the model, held anyway.
        cache_bytes: key-value storage of trunk and policy for prompts and slots.
        tables_bytes: what merging adds for each code, made once per call.
        results_bytes: tokens, codes and their numbers.
        replay_bytes: states kept for replay.
    """

    weights_bytes: int
    cache_bytes: int
    tables_bytes: int
    results_bytes: int
    replay_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.new_bytes

    @property
    def new_bytes(self) -> int:
        """What a first call allocates on top of the weights."""
        return self.cache_bytes + self.tables_bytes + self.results_bytes + self.replay_bytes

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


def make_plan(
    model: LatentActionModel,
    *,
    layout: SlotLayout,
    requests: int,
    prompt_tokens: int,
    new_tokens: int,
    hidden_dtype: torch.dtype | None,
) -> DecodePlan:
    """Count; see ``Decoder.plan``.

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
    return DecodePlan(
        weights_bytes=weights,
        cache_bytes=layout.positions * width,
        tables_bytes=_tables_bytes(model),
        results_bytes=rows * new_tokens * (2 * 8 + 3 * 4),
        replay_bytes=hidden,
    )
