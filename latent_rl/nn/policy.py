"""The latent policy: a distribution over codes from the states so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class LatentPolicy(nn.Module):
    """A causal tower over e_1..e_t and a linear head on K codes."""

    def __init__(self, tower: nn.Module, hidden: int, num_codes: int) -> None:
        """The head starts small (std 0.02), so an untrained policy is close to uniform."""
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(hidden, num_codes, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(
        self,
        state: Tensor,
        tower_kwargs: Mapping[str, Any],
        *,
        past_key_values: Any | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """State [B, L, H] -> float32 logits [B, L, K] ([B, 1, K] with ``last_only``).

        Args:
            state: [B, L, H]; with a cache, the L new positions alone.
            tower_kwargs: attention mask and position ids as the decoder saw them.
            past_key_values: a transformers cache holding this tower's layers, or None.
            last_only: run the head on the last position only.
        """
        hidden = self.features(state, tower_kwargs, past_key_values=past_key_values)
        return self.logits(hidden[:, -1:] if last_only else hidden)

    def features(
        self, state: Tensor, tower_kwargs: Mapping[str, Any], *, past_key_values: Any | None = None
    ) -> Tensor:
        """State [B, L, H] -> the tower's normalised output [B, L, H], what the head reads."""
        out = self.tower(
            inputs_embeds=state.to(self.head.weight.dtype),
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            **tower_kwargs,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def logits(self, features: Tensor) -> Tensor:
        """Features [..., H] -> float32 logits [..., K]."""
        logits: Tensor = self.head(features)
        return logits.float()
