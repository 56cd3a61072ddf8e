"""C++ backend of gated_merge: the matrix products are torch's, what lies between them is fused."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import accumulator, address, dtype_code, threads
from latent_rl.native._segments import segment_sum

__all__ = ["gated_merge_backward", "gated_merge_forward", "gated_merge_step"]


def gated_merge_forward(
    e: Tensor, codes: Tensor, codebook: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One merge block: W_down(silu(W_gate [e; c]) * (W_up [e; c])) with c = codebook[code].

    [e; c] W^T = e W_e^T + (codebook W_c^T)[code]: the code's half of the two widest products is a
    table of K rows and a gather.

    Args:
        e: [N, H] on the CPU. codes: int64 [N]. codebook: [K, D].
        w_gate, w_up: [I, H + D]. w_down: [H, I].

    Returns:
        out [N, H] (NaN rows where the code is -1), and the two pre-activations [N, I] that the
        backward needs. bfloat16 and float16 are computed in float32 and rounded once.
    """
    hidden = e.shape[1]
    wide = accumulator(e.dtype)
    table = codebook.to(wide)
    gate, up = w_gate.to(wide), w_up.to(wide)
    tables = table @ gate[:, hidden:].T, table @ up[:, hidden:].T
    out, pre_gate, pre_up = _merge(e, codes, tables, gate[:, :hidden], up[:, :hidden], w_down)
    return out, pre_gate.to(e.dtype), pre_up.to(e.dtype)


def gated_merge_step(
    e: Tensor, codes: Tensor, tables: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """The block's output alone, from the code's share of both products made before.

    Args:
        e: [N, H] on the CPU. codes: int64 [N].
        tables: [2, K, I] in the accumulator's dtype, contiguous.
        w_gate, w_up: [I, H + D], of which the first H columns are used. w_down: [H, I].

    Returns:
        out [N, H] (NaN rows where the code is -1).
    """
    hidden, wide = e.shape[1], tables.dtype
    gate, up = w_gate[:, :hidden].to(wide), w_up[:, :hidden].to(wide)
    return _merge(e, codes, (tables[0], tables[1]), gate, up, w_down)[0]


def _merge(
    e: Tensor,
    codes: Tensor,
    tables: tuple[Tensor, Tensor],
    gate: Tensor,
    up: Tensor,
    w_down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [N, H] in e's dtype and both pre-activations; weights are e's halves, [I, H]."""
    codes = codes.contiguous()
    rows = e.to(gate.dtype)
    pre_gate, pre_up = rows @ gate.T, rows @ up.T
    activation = torch.empty_like(pre_gate)
    _C.merge_forward(
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
        threads(),
    )
    return (activation @ w_down.to(gate.dtype).T).to(e.dtype), pre_gate, pre_up


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
    num_codes = codebook.shape[0]
    wide = accumulator(e.dtype)
    codes = codes.contiguous()
    rows, table = e.to(wide), codebook.to(wide)
    gate, up, down = w_gate.to(wide), w_up.to(wide), w_down.to(wide)
    grad = grad_out.to(wide)
    if bool((codes < 0).any()):
        invalid = (codes < 0)[:, None]
        grad, rows = grad.masked_fill(invalid, 0.0), rows.masked_fill(invalid, 0.0)
    wide_gate, wide_up = pre_gate.to(wide).contiguous(), pre_up.to(wide).contiguous()
    d_activation = grad @ down
    d_gate, d_up = torch.empty_like(wide_gate), torch.empty_like(wide_up)
    activation = torch.empty_like(wide_gate)
    _C.merge_backward(
        dtype_code("gated_merge", wide_gate),
        address(d_activation),
        address(wide_gate),
        address(wide_up),
        address(codes),
        address(d_gate),
        address(d_up),
        address(activation),
        e.shape[0],
        num_codes,
        w_gate.shape[0],
        threads(),
    )
    # The gradient of the table of K rows: every row of the same code adds to one entry.
    d_table_gate = segment_sum(d_gate, codes, num_codes)
    d_table_up = segment_sum(d_up, codes, num_codes)
    code_gate, code_up = gate[:, hidden:], up[:, hidden:]
    d_codebook = torch.zeros_like(codebook)
    if not need_code_vectors:
        d_codebook = (d_table_gate @ code_gate + d_table_up @ code_up).to(codebook.dtype)
    d_code_vectors = d_code_probs = None
    if need_code_vectors:
        d_code_vectors = (d_gate @ code_gate + d_up @ code_up).to(codebook.dtype)
    if need_code_probs:
        d_code_probs = d_gate @ (table @ code_gate.T).T + d_up @ (table @ code_up.T).T
        d_code_probs = d_code_probs.to(codebook.dtype)
    return (
        torch.addmm(d_gate @ gate[:, :hidden], d_up, up[:, :hidden]).to(e.dtype),
        d_codebook,
        torch.cat([d_gate.T @ rows, d_table_gate.T @ table], 1).to(w_gate.dtype),
        torch.cat([d_up.T @ rows, d_table_up.T @ table], 1).to(w_up.dtype),
        (grad.T @ activation).to(w_down.dtype),
        d_code_vectors,
        d_code_probs,
    )
