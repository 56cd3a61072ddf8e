"""Reference of sample_codes."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl.reference.philox import gumbel_noise


def _truncate(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Mask [B, K] of the codes that stay; ties at a boundary keep the lowest ids."""
    order = scaled.sort(stable=True, dim=-1, descending=True).indices
    rank_keeps = torch.ones_like(scaled, dtype=torch.bool)
    if 0 < top_k < scaled.shape[-1]:
        rank_keeps[:, top_k:] = False
    ranked = scaled.gather(-1, order).masked_fill(~rank_keeps, -torch.inf)
    probs = ranked.softmax(-1)
    if top_p < 1:
        # The smallest leading set whose mass reaches top_p of the whole: a code stays while the
        # mass before it falls short, and the first always does. Masses are relative to the
        # likeliest code, so codes as likely as it add up exactly, in whatever order.
        mass = (ranked - ranked[:, :1]).exp().cumsum(-1)
        rank_keeps[:, 1:] &= mass[:, :-1] < top_p * mass[:, -1:]
    if min_p > 0:
        rank_keeps &= probs >= min_p * probs[:, :1]
    return torch.zeros_like(rank_keeps).scatter(-1, order, rank_keeps)


def sample_codes(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seeds: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw one code per row by the Gumbel-max trick from the tempered, truncated distribution.

    Args:
        logits: [B, K]; -inf masks a code.
        temperature: > 0, or 0 for the most likely code.
        top_k, top_p, min_p: truncations in this order; 0, 1 and 0 turn them off.
        seeds, offsets: int64 [B].

    Returns:
        codes int64 [B]; log-probability [B] under the distribution sampled from; log-probability
        [B] under softmax(logits); entropy [B] in nats of the distribution sampled from. A row with
        NaN or +inf, or without a code left, gives code -1 and NaN.
    """
    accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
    broken = (logits.isnan() | (logits == torch.inf)).any(-1)
    valid = ~broken & (logits > -torch.inf).any(-1)
    exact = torch.where(valid[:, None], logits, 0).double()
    full = exact.log_softmax(-1)
    if temperature == 0:
        codes = exact.argmax(-1)
        logprob = entropy = torch.zeros_like(exact[:, 0])
    else:
        scaled = exact / temperature
        # Logits over a tiny temperature may overflow, and then define no distribution.
        valid &= scaled.amax(-1).isfinite()
        scaled = torch.where(valid[:, None], scaled, 0)
        keep = _truncate(scaled, top_k, top_p, min_p)
        kept = scaled.masked_fill(~keep, -torch.inf)
        codes = (kept + gumbel_noise(seeds, offsets, logits.shape[-1])).argmax(-1)
        log_probs = kept.log_softmax(-1)
        logprob = log_probs.gather(-1, codes[:, None])[:, 0]
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
    logprob_full = full.gather(-1, codes[:, None])[:, 0]
    floats = [
        value.masked_fill(~valid, torch.nan).to(accumulator)
        for value in (logprob, logprob_full, entropy)
    ]
    return torch.where(valid, codes, -1), floats[0], floats[1], floats[2]
