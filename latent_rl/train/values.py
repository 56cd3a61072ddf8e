"""The value head of PPO: a linear map beside the policy's head, on the same tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["ValueHead", "attach_value_head", "explained_variance"]


class ValueHead(nn.Module):
    """V(e_1..e_t) from what the policy's head reads. All values begin at 0."""

    def __init__(self, hidden: int, *, detach: bool = True) -> None:
        """hidden: H. detach: whether the value loss stops here; False lets it move the tower, which
        then serves both and no longer follows the policy gradient alone."""
        super().__init__()
        self.detach = detach
        self.linear = nn.Linear(hidden, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features [..., H] -> float32 values [...]."""
        read = features.detach() if self.detach else features
        value: Tensor = self.linear(read.to(self.linear.weight.dtype))
        return value[..., 0].float()


def attach_value_head(model: LatentActionModel, *, detach: bool) -> ValueHead:
    """Give the model a new value head in float32 and return it.

    It stands beside `model.latent`, so that wrappers of distributed training synchronise it, and
    saved models do not hold it: nothing but training needs one.
    """
    weight = model.latent.policy.head.weight
    head = ValueHead(weight.shape[1], detach=detach).to(weight.device)
    model.add_module("value_head", head)
    return head


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) [] over the masked entries: 1 is a perfect
    value head, 0 one that knows nothing; NaN where returns do not vary."""
    kept, wanted = values[mask], returns[mask]
    spread = wanted.var(correction=0)
    residual = (wanted - kept).var(correction=0)
    return torch.where(spread > 0, 1 - residual / spread, torch.nan)
