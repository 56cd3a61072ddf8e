"""Next-token cross-entropy on response positions, without logits nobody reads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["IGNORE_INDEX", "next_tokens", "response_mask", "token_cross_entropy"]

IGNORE_INDEX = -100
"""Label of positions that are no target."""

LOGITS_PER_CHUNK = 1 << 24
"""Logits (rows x vocabulary) held at once: 64 MB in float32, 110 rows of a 152k vocabulary. Smaller
problems run as one chunk."""


def next_tokens(labels: Tensor) -> Tensor:
    """Shift labels [B, L] so that position t holds the label of token t+1; the last holds -100."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def response_mask(labels: Tensor) -> Tensor:
    """Return bool [B, L], True where the token after this position is a response token: the
    positions whose hidden state and code explain something."""
    return next_tokens(labels) != IGNORE_INDEX


def token_cross_entropy(model: LatentActionModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats, float32) of targets under the model's vocabulary head.

    hidden [M, H] merged states of the positions that count, targets [M] int64. Never holds more
    than `LOGITS_PER_CHUNK` logits: Liger's fused kernel where it is installed and applies (CUDA,
    plain head), chunks otherwise. With a frozen head the gradient with respect to `hidden` is
    computed in the forward pass, chunk by chunk, so no chunk is computed twice. M = 0 gives 0 with
    a zero gradient.

    Raises:
        ValueError: hidden and targets disagree.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_cross_entropy: hidden must be [M, H] and targets [M], "
            f"got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    if hidden.shape[0] == 0:
        return hidden.sum().float()
    embeddings: Any = cast(Any, model.backbone).get_output_embeddings()
    rows = max(1, LOGITS_PER_CHUNK // embeddings.weight.shape[0])
    if liger_why_not(model, embeddings, hidden) is None:
        return _liger(embeddings, hidden, targets)
    count = hidden.shape[0]
    if not (torch.is_grad_enabled() and hidden.requires_grad) or count <= rows:
        return _summed(model.lm_logits, hidden, targets, rows) / count
    if any(parameter.requires_grad for parameter in embeddings.parameters()):
        return _recomputed(model.lm_logits, hidden, targets, rows) / count
    total: Tensor = _FrozenHead.apply(hidden, targets, model.lm_logits, rows)  # type: ignore[no-untyped-call]
    return total / count


def liger_why_not(model: LatentActionModel, embeddings: nn.Module, hidden: Tensor) -> str | None:
    """Return why Liger's fused linear cross-entropy cannot serve, or None if it can."""
    if not hidden.is_cuda:
        return "the hidden states are not on a CUDA device"
    if type(embeddings) is not nn.Linear:
        return f"the vocabulary head is a {type(embeddings).__name__}, not a Linear"
    text_config = model.config.get_text_config()
    if getattr(text_config, "final_logit_softcapping", None):
        return "the backbone softcaps its logits"
    # Cohere multiplies and Granite divides its logits; Liger's kernel would leave that out.
    if any(getattr(text_config, name, 1) != 1 for name in ("logit_scale", "logits_scaling")):
        return "the backbone scales its logits"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def _liger(embeddings: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    weight: Any = embeddings.weight
    loss: Any = liger_fused_linear_cross_entropy(
        hidden.to(weight.dtype), weight, targets, bias=embeddings.bias
    )
    total: Tensor = loss[0] if isinstance(loss, tuple) else loss
    return total.float()


Head = Callable[[Tensor], Tensor]


def _chunks(hidden: Tensor, targets: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)


def _chunk_loss(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _summed(head: Head, hidden: Tensor, targets: Tensor, rows: int) -> Tensor:
    return torch.stack([_chunk_loss(head, h, t) for h, t in _chunks(hidden, targets, rows)]).sum()


def _recomputed(head: Head, hidden: Tensor, targets: Tensor, rows: int) -> Tensor:
    """As `_summed`, with each chunk's logits recomputed in backward (the head itself trains)."""
    parts = [
        checkpoint(_chunk_loss, head, h, t, use_reentrant=False)
        for h, t in _chunks(hidden, targets, rows)
    ]
    return torch.stack(parts).sum()


class _FrozenHead(torch.autograd.Function):
    """Summed cross-entropy whose gradient is taken in forward: two products with the head per chunk
    instead of the three that recomputation needs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        start = 0
        for part, target in _chunks(hidden, targets, rows):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = _chunk_loss(head, leaf, target)
                (grad,) = torch.autograd.grad(loss, leaf)
            gradient[start : start + part.shape[0]] = grad
            start += part.shape[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None
