"""The inverse-dynamics model: which code explains the token that came next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class InverseDynamics(nn.Module):
    """A causal tower over the states and a head, read one position after the action it names.

    The action at t explains token t+1, so it may see e_1..e_{t+1}: the head's output at t+1 is
    the feature of position t.
    """

    def __init__(self, tower: nn.Module, hidden: int, feature_dim: int) -> None:
        """``feature_dim`` is the quantizer's F."""
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(hidden, feature_dim, bias=False)
        nn.init.normal_(self.head.weight, std=hidden**-0.5)

    def forward(self, state: Tensor, tower_kwargs: Mapping[str, Any]) -> Tensor:
        """State [B, L, H] -> features [B, L, F]; position L-1 has no future and is zero."""
        dtype = self.head.weight.dtype
        out = self.tower(inputs_embeds=state.to(dtype), use_cache=False, **tower_kwargs)
        features: Tensor = self.head(out.last_hidden_state)
        return torch.cat([features[:, 1:], torch.zeros_like(features[:, :1])], dim=1)
