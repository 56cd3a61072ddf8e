"""CUDA backend of gated_merge: cuBLAS for the products, one kernel for all that lies between."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import address, dtype_code
from latent_rl.native._segments_cuda import current_stream, group_rows, segment_sum

__all__ = ["gated_merge_backward_cuda", "gated_merge_forward_cuda", "gated_merge_step_cuda"]


def gated_merge_forward_cuda(
    e: Tensor, codes: Tensor, codebook: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One merge block: W_down(silu(W_gate [e; c]) * (W_up [e; c])) with c = codebook[code].

    As ``latent_rl.native.gated_merge.gated_merge_forward``, for CUDA tensors of float32, bfloat16
    or float16: on torch's current stream, no host sync. The products round to e's dtype, what
    lies between is float32.
    """
    hidden = e.shape[1]
    with torch.cuda.device(e.device):
        # K rows alone: unrounded they cost nothing, and the sum in the kernel keeps their digits.
        tables = _table(codebook, w_gate[:, hidden:]), _table(codebook, w_up[:, hidden:])
        return _merge(e, codes, tables, w_gate[:, :hidden], w_up[:, :hidden], w_down)


def gated_merge_step_cuda(
    e: Tensor, codes: Tensor, tables: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """The block's output alone, from the code's share of both products made before.

    As ``latent_rl.native.gated_merge.gated_merge_step``, for CUDA tensors: half of the two widest
    weights is not even read. tables: float32 [2, K, I], contiguous.
    """
    hidden = e.shape[1]
    with torch.cuda.device(e.device):
        halves = w_gate[:, :hidden], w_up[:, :hidden]
        return _merge(e, codes, (tables[0], tables[1]), *halves, w_down)[0]


def _merge(
    e: Tensor,
    codes: Tensor,
    tables: tuple[Tensor, Tensor],
    gate: Tensor,
    up: Tensor,
    w_down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [N, H] and both pre-activations [N, I]; weights are e's halves, [I, H]."""
    codes = codes.contiguous()
    pre_gate, pre_up = torch.mm(e, gate.T), torch.mm(e, up.T)
    activation = torch.empty(pre_gate.shape, dtype=e.dtype, device=e.device)
    _C.merge_forward_cuda(
        dtype_code("gated_merge", pre_gate),
        address(pre_gate),
        address(pre_up),
        address(tables[0]),
        address(tables[1]),
        address(codes),
        address(activation),
        e.shape[0],
        tables[0].shape[0],
        gate.shape[0],
        current_stream(e),
    )
    return torch.mm(activation, w_down.T), pre_gate, pre_up


def gated_merge_backward_cuda(
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

    As ``latent_rl.native.gated_merge.gated_merge_backward``. Activations are computed anew; the
    table's gradient is a sum over rows grouped by code, in a fixed order.
    """
    hidden, inner, num_codes = e.shape[1], w_gate.shape[0], codebook.shape[0]
    with torch.cuda.device(e.device):
        codes = codes.contiguous()
        # Always, since knowing whether any row lacks a code would wait for the device. 0 * NaN
        # would reach the weights.
        invalid = ((codes < 0) | (codes >= num_codes))[:, None]
        grad, rows = grad_out.masked_fill(invalid, 0), e.masked_fill(invalid, 0)
        d_pre, activation = _pre_gradients(
            torch.mm(grad, w_down), pre_gate, pre_up, codes, codebook
        )
        d_table = segment_sum(d_pre, group_rows(codes, num_codes)).to(e.dtype)
        halves = (w_gate[:, :hidden], w_up[:, :hidden])
        code_halves = (w_gate[:, hidden:], w_up[:, hidden:])
        d_weights = []
        for columns in (slice(0, inner), slice(inner, 2 * inner)):
            weight = torch.empty(w_gate.shape, dtype=e.dtype, device=e.device)
            torch.mm(d_pre[:, columns].T, rows, out=weight[:, :hidden])
            torch.mm(d_table[:, columns].T, codebook, out=weight[:, hidden:])
            d_weights.append(weight)
        d_codebook = torch.zeros(codebook.shape, dtype=e.dtype, device=e.device)
        if not need_code_vectors:
            d_codebook = _both(d_table, code_halves)
        return (
            _both(d_pre, halves),
            d_codebook,
            d_weights[0],
            d_weights[1],
            torch.mm(grad.T, activation),
            _both(d_pre, code_halves) if need_code_vectors else None,
            torch.mm(d_pre, _joined_table(codebook, code_halves).T) if need_code_probs else None,
        )


def _pre_gradients(
    d_activation: Tensor, pre_gate: Tensor, pre_up: Tensor, codes: Tensor, codebook: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of both pre-activations side by side [N, 2 I], and the activation [N, I]."""
    rows, inner = pre_gate.shape
    pre_gate, pre_up = pre_gate.contiguous(), pre_up.contiguous()
    dtype, device = pre_gate.dtype, pre_gate.device
    d_pre = torch.empty((rows, 2 * inner), dtype=dtype, device=device)
    activation = torch.empty((rows, inner), dtype=dtype, device=device)
    _C.merge_backward_cuda(
        dtype_code("gated_merge", pre_gate),
        address(d_activation),
        address(pre_gate),
        address(pre_up),
        address(codes),
        address(d_pre),
        address(activation),
        rows,
        codebook.shape[0],
        inner,
        current_stream(pre_gate),
    )
    return d_pre, activation


def _both(joined: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Gate half times gate weight plus up half times up weight."""
    inner = weights[0].shape[0]
    out = torch.mm(joined[:, :inner], weights[0])
    return out.addmm_(joined[:, inner:], weights[1])


def _table(codebook: Tensor, weight: Tensor) -> Tensor:
    """codebook W^T, float32 [K, I]."""
    if codebook.dtype == torch.float32:
        return torch.mm(codebook, weight.T)
    return torch.mm(codebook, weight.T, out_dtype=torch.float32)


def _joined_table(codebook: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """codebook [W_gate; W_up]^T in the codebook's dtype, [K, 2 I]."""
    return torch.cat([torch.mm(codebook, weight.T) for weight in weights], 1)
