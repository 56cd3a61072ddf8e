"""Which codes a node of the tree search may go on with, and what its state is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CodeCritic", "CriticPruned", "PolicyTopK", "Proposer", "StateValue"]


class CodeCritic(Protocol):
    """Q-values of codes, such as a linear head trained on rewards of rollouts."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features [N, H] of the policy's tower -> float [N, K]: the value of taking each code."""
        ...


class StateValue(Protocol):
    """Values of states, such as the value head of PPO."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features [N, H] of the policy's tower -> float [N]."""
        ...


class Proposer(Protocol):
    """Chooses the codes a node goes on with."""

    def __call__(self, logits: Tensor, features: Tensor) -> list[list[tuple[int, float]]]:
        """The ways on of N nodes, each (code, prior), the most promising first.

        Args:
            logits: float32 [N, K] of the policy.
            features: [N, H] of its tower.
        """
        ...


@dataclass(frozen=True)
class PolicyTopK:
    """The k most likely codes, their probabilities scaled to sum to 1; ties to the lowest id.

    Attributes:
        k: ways on; K or more keeps all codes.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"PolicyTopK: k must be >= 1, got {self.k}")

    def __call__(self, logits: Tensor, features: Tensor) -> list[list[tuple[int, float]]]:
        """See :class:`Proposer`."""
        probs, codes = _ranked(logits)
        keep = min(self.k, probs.shape[1])
        return _proposals(codes[:, :keep], probs[:, :keep])


@dataclass(frozen=True)
class CriticPruned:
    """Of the most likely codes, those that a critic values most, with the policy's priors.

    The idea of CoLA's MCTS-Q (arXiv 2503.21383): a Q-function prunes the codes that the policy
    suggests.

    Attributes:
        critic: Q-values of codes.
        candidates: most likely codes to look at.
        k: of them to keep.
    """

    critic: CodeCritic
    candidates: int
    k: int

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.candidates:
            raise ValueError(
                f"CriticPruned: k must be in [1, candidates ({self.candidates})], got {self.k}"
            )

    def __call__(self, logits: Tensor, features: Tensor) -> list[list[tuple[int, float]]]:
        """See :class:`Proposer`."""
        probs, codes = _ranked(logits)
        width = min(self.candidates, probs.shape[1])
        probs, codes = probs[:, :width], codes[:, :width]
        values = self.critic(features).to(probs.dtype).gather(1, codes)
        best = values.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        # In the policy's order: the tree prefers the earlier of equals.
        best = best.sort(dim=1).values
        return _proposals(codes.gather(1, best), probs.gather(1, best))


def _ranked(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and codes, most likely first, ties to the lowest id."""
    probs = logits.double().softmax(-1)
    order = probs.argsort(dim=-1, descending=True, stable=True)
    return probs.gather(-1, order), order


def _proposals(codes: Tensor, probs: Tensor) -> list[list[tuple[int, float]]]:
    # A code of probability 0 (a masked one) is no way on.
    probs = probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
    return [
        [(code, prior) for code, prior in zip(row, weights, strict=True) if prior > 0]
        for row, weights in zip(codes.tolist(), probs.tolist(), strict=True)
    ]
