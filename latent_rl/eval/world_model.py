"""Does the world model listen to the codes? Cross-entropies that tell.

A codebook may be in full use and yet be ignored by the merge; then the cross-entropy under random
codes is no worse than under the inverse model's. Usage perplexity alone cannot show that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_rl.models import LatentActionModel

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class WorldModelReport:
    """Cross-entropies in nats per response token.

    Attributes:
        base: the base model without codes.
        inverse: under the inverse model's code (it has seen the token, so a lower bound).
        random: under uniformly random codes; close to ``inverse`` means ignored codes.
        marginal: of the policy's mixture, ``-log sum_k pi(k|s) p(token|s, k)``; comparable with
            ``base`` since neither sees the token.
        tokens: number of response tokens measured.
    """

    base: float
    inverse: float
    random: float
    marginal: float
    tokens: int


@torch.no_grad()
def world_model_report(
    model: LatentActionModel,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    rows_per_chunk: int = 2048,
) -> WorldModelReport:
    """Measure :class:`WorldModelReport` over batches of ``{"inputs": ..., "labels": [B, L]}``.

    ``rows_per_chunk`` bounds the (position, code) pairs whose vocabulary logits are held at once.

    Raises:
        ValueError: when no batch holds a response token.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        trace = model.encode(batch["inputs"])
        state = model.state(trace)
        acts, targets = _response_positions(batch["labels"])
        if not acts.any():
            continue
        codes = model.inverse_codes(model.inverse(state, trace).head)[acts]
        log_policy = model.policy_logits(state, trace)[acts].log_softmax(-1)
        num_codes = log_policy.shape[-1]
        drawn = torch.randint(num_codes, codes.shape, generator=generator).to(codes.device)
        chosen = state[acts]
        sums[0] += _nll(model.lm_logits(trace.hidden[acts]), targets).sum()
        sums[1] += _nll(model.lm_logits(model.merge(chosen, codes)), targets).sum()
        sums[2] += _nll(model.lm_logits(model.merge(chosen, drawn)), targets).sum()
        sums[3] += _marginal_nll(model, chosen, targets, log_policy, rows_per_chunk).sum()
        tokens += targets.numel()
    if not tokens:
        raise ValueError("world_model_report: no batch holds a response token (labels != -100)")
    base, inverse, random, marginal = (sums / tokens).tolist()
    return WorldModelReport(base, inverse, random, marginal, tokens)


def _response_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mask [B, L] of positions whose code explains a response token, and those tokens."""
    acts = torch.zeros_like(labels, dtype=torch.bool)
    acts[:, :-1] = labels[:, 1:] != -100
    return acts, labels[:, 1:][acts[:, :-1]]


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none").double().cpu()


def _marginal_nll(
    model: LatentActionModel,
    state: Tensor,
    targets: Tensor,
    log_policy: Tensor,
    rows_per_chunk: int,
) -> Tensor:
    """-log sum_k pi(k|s) p(target|s, k) for ``state`` [N, H]; returns float64 [N]."""
    num_codes = log_policy.shape[-1]
    all_codes = torch.arange(num_codes, device=state.device)
    positions = max(1, math.floor(rows_per_chunk / num_codes))
    parts = []
    for start in range(0, len(state), positions):
        here = state[start : start + positions]
        codes = all_codes.expand(len(here), -1)
        merged = model.merge(here[:, None].expand(-1, num_codes, -1), codes)
        log_probs = model.lm_logits(merged).float().log_softmax(-1)
        wanted = targets[start : start + positions, None, None].expand(-1, num_codes, 1)
        token = log_probs.gather(-1, wanted)[..., 0]
        parts.append(-torch.logsumexp(token + log_policy[start : start + positions], -1))
    return torch.cat(parts).double().cpu()
