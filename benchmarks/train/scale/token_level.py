"""GRPO over tokens, as TRL makes it, on a rollout that is there already."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latent_rl.models import backbone as bb


@dataclass(frozen=True)
class TokenRollout:
    """What a rollout said, without its codes.

    Attributes:
        prompts: the processor's tensors of every completion's prompt, [B, P] and what goes with it.
        ids, mask: int64 and bool [B, T].
        advantages: float32 [B].
        patches: patches of an image; every prompt has one image.
    """

    prompts: Mapping[str, Tensor]
    ids: Tensor
    mask: Tensor
    advantages: Tensor
    patches: int

    def inputs(self, rows: slice) -> dict[str, Tensor]:
        """Prompts and completions of some rows, as the model takes them."""
        patches = slice(rows.start * self.patches, rows.stop * self.patches)
        taken = {
            name: value[patches if name == "pixel_values" else rows]
            for name, value in self.prompts.items()
        }
        return bb.extend_inputs(taken, self.ids[rows], self.mask[rows])


class TokenGrpo:
    """Updates of a whole model: policy and reference are both the vision-language model.

    Per token: min(r A, clip(r, 1 - eps, 1 + eps) A) - beta (exp(d) - d - 1), with d the reference's
    log-probability less the policy's; the mean over a completion's tokens, then over completions
    (``loss_type="grpo"`` of TRL). The vocabulary head runs on completions alone, and
    log-probabilities are taken row by row in the logits' dtype, as TRL does. Weights, gradients and
    Adam's moments are of the backbone's dtype, and no activation is recomputed: the least work and
    memory such an update can be made with.
    """

    def __init__(
        self,
        backbone: nn.Module,
        rollout: TokenRollout,
        *,
        micro: int,
        beta: float,
        epsilon: float = 0.2,
        learning_rate: float = 1e-6,
    ) -> None:
        """``backbone`` is the reference; the policy is a copy of it, which is trained whole."""
        self.reference = backbone.requires_grad_(False).eval()
        self.policy = copy.deepcopy(backbone).requires_grad_(True)
        self.rollout, self.micro, self.beta, self.epsilon = rollout, micro, beta, epsilon
        fused = next(self.policy.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), learning_rate, fused=fused)

    def logprobs(self, model: Any, rows: slice) -> Tensor:
        """[b, T] of the tokens said."""
        ids = self.rollout.ids[rows]
        out = model(
            **self.rollout.inputs(rows), logits_to_keep=ids.shape[1] + 1, use_cache=False
        ).logits[:, :-1]
        return torch.stack(
            [
                row.log_softmax(-1).gather(-1, said[:, None])[:, 0]
                for row, said in zip(out, ids, strict=True)
            ]
        )

    def loss(self, rows: slice) -> Tensor:
        """The mean over a micro-batch's completions."""
        with torch.no_grad():
            reference = self.logprobs(self.reference, rows)
        own = self.logprobs(self.policy, rows)
        ratio = torch.exp(own - own.detach())
        clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
        advantages = self.rollout.advantages[rows, None]
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        difference = reference - own
        kl = torch.exp(difference) - difference - 1
        mask = self.rollout.mask[rows]
        per_token = torch.where(mask, self.beta * kl - gain, 0.0)
        return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()

    def update(self) -> float:
        """All micro-batches, forward and backward, then one clipped step; the gradient's norm."""
        count = len(self.rollout.ids)
        for begin in range(0, count, self.micro):
            rows = slice(begin, min(begin + self.micro, count))
            share = (rows.stop - rows.start) / count
            (self.loss(rows) * share).backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)
