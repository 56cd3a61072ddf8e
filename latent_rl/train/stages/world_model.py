"""The language world model's share of every pretraining stage: infer codes, merge, explain
tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latent_rl.train.token_loss import next_tokens, response_mask, token_cross_entropy

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel, Trace

__all__ = ["Inferred", "code_usage", "draw_seed", "infer_codes", "probe_codes", "world_model_loss"]


def draw_seed() -> int:
    """Draw a seed for a counter-based op from torch's CPU generator, whose state checkpoints
    carry."""
    return int(torch.randint(0, 2**62, (), dtype=torch.int64))


@dataclass(frozen=True)
class Inferred:
    """Codes the inverse dynamics assigns to the M response positions of a batch.

    state [M, H]; targets [M] next tokens; codes [M]; vectors [M, D] straight-through; text_only [M]
    bool; quantizer_loss []; entropy [M] of the code distribution, nats (0 where the
    quantizer is deterministic).
    """

    state: Tensor
    targets: Tensor
    codes: Tensor
    vectors: Tensor
    text_only: Tensor
    quantizer_loss: Tensor
    entropy: Tensor


def infer_codes(model: LatentActionModel, trace: Trace, labels: Tensor, *, seed: int) -> Inferred:
    """Run the inverse tower over the sequences and quantise its reading of each response position.

    The head's output at t has seen token t+1, which the code at t explains.
    """
    state = model.state(trace)
    inverse = model.inverse(state, trace)
    mask = response_mask(labels) & inverse.valid
    head = inverse.head[mask]
    quantized = model.quantize(head, seed=seed)
    return Inferred(
        state=state[mask],
        targets=next_tokens(labels)[mask],
        codes=quantized.codes,
        vectors=quantized.vectors,
        text_only=trace.text_only[:, None].expand_as(mask)[mask],
        quantizer_loss=quantized.loss,
        entropy=quantized.entropy,
    )


def world_model_loss(
    model: LatentActionModel, inferred: Inferred, rows: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of the response given (state, code); rows [M] bool picks
    positions."""
    state, codes, vectors, targets = (
        inferred.state,
        inferred.codes,
        inferred.vectors,
        inferred.targets,
    )
    if rows is not None:
        state, codes, vectors, targets = state[rows], codes[rows], vectors[rows], targets[rows]
    merged = model.merge(state, codes, code_vectors=vectors)
    return token_cross_entropy(model, merged, targets)


@torch.no_grad()
def probe_codes(model: LatentActionModel, state: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the cross-entropy of targets [M] from state [M, H] without codes (`base_ce`) and under
    uniformly random ones (`random_ce`).

    `ce` far below `base_ce` says the codes carry information; `random_ce` near `ce` says the merge
    ignores them.
    """
    # A generator of its own: looking must not move the random numbers training will draw.
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, model.latent_config.num_codes, targets.shape, generator=generator)
    merged = model.merge(state, codes.to(targets.device))
    return {
        "base_ce": token_cross_entropy(model, state, targets),
        "random_ce": token_cross_entropy(model, merged, targets),
    }


@torch.no_grad()
def code_usage(codes: Tensor, num_codes: int) -> dict[str, Tensor]:
    """Return `codes_used` (distinct) and `code_perplexity` (exp of the histogram's entropy) of
    codes; -1 entries do not count."""
    kept = codes[codes >= 0]
    counts = torch.bincount(kept.flatten(), minlength=num_codes).float()
    share = counts / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    return {"codes_used": (counts > 0).sum().float(), "code_perplexity": entropy.exp()}
