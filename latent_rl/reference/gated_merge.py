"""Reference of gated_merge."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_merge_forward(
    e: Tensor, codes: Tensor, codebook: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One merge block: W_down(silu(W_gate [e; c]) * (W_up [e; c])) with c = codebook[code].

    Args:
        e: [N, H]. codes: int64 [N]. codebook: [K, D].
        w_gate, w_up: [I, H + D]. w_down: [H, I].

    Returns:
        out [N, H] (NaN rows where the code is -1), and the two pre-activations [N, I] that the
        backward needs.
    """
    joined = torch.cat([e, codebook[codes.clamp(min=0)]], -1)
    pre_gate, pre_up = F.linear(joined, w_gate), F.linear(joined, w_up)
    out = F.linear(F.silu(pre_gate) * pre_up, w_down)
    return out.masked_fill((codes < 0)[:, None], torch.nan), pre_gate, pre_up


def gated_merge_step(
    e: Tensor, codes: Tensor, tables: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """The block's output alone, from the code's share of both products made before.

    Args:
        e: [N, H]. codes: int64 [N].
        tables: [2, K, I], the codebook through the last D columns of w_gate and w_up; float32
            (float64 for float64).
        w_gate, w_up: [I, H + D], of which the first H columns are used. w_down: [H, I].

    Returns:
        out [N, H] (NaN rows where the code is -1).
    """
    hidden, wide = e.shape[1], tables.dtype
    entry = tables[:, codes.clamp(min=0)]
    pre_gate = F.linear(e.to(wide), w_gate[:, :hidden].to(wide)) + entry[0]
    pre_up = F.linear(e.to(wide), w_up[:, :hidden].to(wide)) + entry[1]
    out = F.linear(F.silu(pre_gate) * pre_up, w_down.to(wide)).to(e.dtype)
    return out.masked_fill((codes < 0)[:, None], torch.nan)


def gated_merge_backward(
    grad_out: Tensor,
    e: Tensor,
    codes: Tensor,
    codebook: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    pre_gate: Tensor,
    pre_up: Tensor,
    need_code_vectors: bool,
    need_code_probs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of e, codebook, the three weights, and of the code's stand-ins where asked.

    ``code_vectors`` [N, D] stands for codebook[codes]; with it the codebook itself gets zero.
    ``code_probs`` [N, K] stands for the one-hot rows. Rows with code -1 contribute nothing.
    """
    hidden = e.shape[1]
    valid = (codes >= 0)[:, None]
    grad = torch.where(valid, grad_out, 0)
    vectors = codebook[codes.clamp(min=0)]
    joined = torch.cat([e, vectors], -1).masked_fill(~valid, 0)
    pre_gate, pre_up = pre_gate.masked_fill(~valid, 0), pre_up.masked_fill(~valid, 0)
    gate = pre_gate.sigmoid()
    silu = pre_gate * gate
    d_inner = grad @ w_down
    d_gate = d_inner * pre_up * gate * (1 + pre_gate * (1 - gate))
    d_up = d_inner * silu
    d_joined = d_gate @ w_gate + d_up @ w_up
    d_vectors = d_joined[:, hidden:]
    if need_code_vectors:
        d_codebook = torch.zeros_like(codebook)
    else:
        one_hot = F.one_hot(codes.clamp(min=0), len(codebook)).to(d_vectors.dtype)
        d_codebook = one_hot.T @ d_vectors
    return (
        d_joined[:, :hidden].contiguous(),
        d_codebook,
        d_gate.T @ joined,
        d_up.T @ joined,
        grad.T @ (silu * pre_up),
        d_vectors.contiguous() if need_code_vectors else None,
        d_vectors @ codebook.T if need_code_probs else None,
    )
