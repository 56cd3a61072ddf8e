"""The cross-modal projector: from text-only states to the states an image would have given."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn


class Gaussian(NamedTuple):
    """A diagonal normal distribution over states: mean and log-variance, both [..., H]."""

    mean: Tensor
    logvar: Tensor


def gaussian_nll(prediction: Gaussian, target: Tensor) -> Tensor:
    """``sum_h (mu - y)^2 exp(-logvar) + logvar`` per row (paper's projector loss; constants out).

    Args:
        prediction: mean and log-variance [..., H].
        target: [..., H]; give it detached where it is a fixed target.

    Returns:
        float32 [...]; the caller averages over real tokens.
    """
    mean, logvar = prediction.mean.float(), prediction.logvar.float()
    error = (mean - target.float()).square()
    return (error * torch.exp(-logvar) + logvar).sum(-1)


def _bottleneck(hidden: int) -> nn.Sequential:
    middle = max(1, hidden // 2)
    return nn.Sequential(nn.Linear(hidden, middle), nn.Tanh(), nn.Linear(middle, hidden))


class Projector(nn.Module):
    """One direction: ``mu = e + net_mu(e)``, ``logvar = tanh(net_logvar(e))``.

    Both nets are H - H/2 - H with tanh. The paper has ``mu = net_mu(e)``. Here the net's last
    layer starts at zero and its output is added to e, so an untrained projector is the identity:
    text-only inference goes through it as well, and a freshly wrapped model, or one whose user
    skips the projector's stages, must still speak. The final tanh bounds the variance to
    [1/e, e].
    """

    def __init__(self, hidden: int) -> None:
        """Build both nets for states of width ``hidden``."""
        super().__init__()
        self.mean_net = _bottleneck(hidden)
        self.logvar_net = _bottleneck(hidden)
        last = self.mean_net[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def mean(self, e: Tensor) -> Tensor:
        """[..., H] -> [..., H]: what inference uses; the log-variance net is not run."""
        e = e.to(self.dtype)
        shift: Tensor = self.mean_net(e)
        return e + shift

    def forward(self, e: Tensor) -> Gaussian:
        """[..., H] -> mean and log-variance."""
        return Gaussian(self.mean(e), torch.tanh(self.logvar_net(e.to(self.dtype))))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; states of a backbone in another dtype are cast to it."""
        return cast(Tensor, self.mean_net[0].weight).dtype


class CrossModalProjector(nn.Module):
    """Both directions: ``to_image_text`` is the paper's P, ``to_text`` its inverse P'."""

    def __init__(self, hidden: int) -> None:
        """Build P and P' for states of width ``hidden``."""
        super().__init__()
        self.to_image_text = Projector(hidden)
        self.to_text = Projector(hidden)

    def forward(self, e: Tensor) -> Tensor:
        """``mu_P(e)``: [..., H] -> [..., H]."""
        return self.to_image_text.mean(e)
