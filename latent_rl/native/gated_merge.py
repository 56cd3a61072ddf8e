"""C++ backend of gated_merge: the matrix products are torch's, what lies between them is fused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latent_rl import _C
from latent_rl.native._call import address, dtype_code, threads
from latent_rl.native._products import product_dtype
from latent_rl.native._segments import segment_sum

__all__ = ["gated_merge_backward", "gated_merge_forward", "gated_merge_step"]


Pair = tuple[Tensor, Tensor]  # of gate and up

# A product of a few rows takes as long as reading its weight: a table of U rows pays from this many
# rows more than U (measured: kernels/gated_merge/README.md).
_LEAST_SAVED_ROWS = 12


def gated_merge_forward(
    e: Tensor, codes: Tensor, codebook: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One merge block: W_down(silu(W_gate [e; c]) * (W_up [e; c])) with c = codebook[code].

    [e; c] W^T = e W_e^T + (codebook W_c^T)[code]: the code's half of the two widest products is a
    table, of the codes in use alone, and a gather. Where rows are hardly more than the codes they
    use, the vectors are joined as written.

    Args:
        e: [N, H] on the CPU. codes: int64 [N]. codebook: [K, D].
        w_gate, w_up: [I, H + D]. w_down: [H, I].

    Returns:
        out [N, H] (NaN rows where the code is -1), and the two pre-activations [N, I] that the
        backward needs. Products accumulate in float32 or wider; where bfloat16 is multiplied as it
        is (``product_dtype``), the table, the pre-activations and the activation are rounded to it
        once each.
    """
    hidden, made_in = e.shape[1], product_dtype(e.dtype)
    in_use = _CodesInUse.of(codes, codebook.shape[0])
    entry = in_use.entry.clamp(min=0)
    rows, table = e.to(made_in), in_use.rows_of(codebook).to(made_in)
    weights = w_gate.to(made_in), w_up.to(made_in)
    if in_use.table_pays():
        pre_gate, pre_up = (
            # The product is added to the gathered rows before it is rounded.
            (table @ weight[:, hidden:].T).index_select(0, entry).addmm_(rows, weight[:, :hidden].T)
            for weight in weights
        )
    else:
        joined = torch.cat([rows, table.index_select(0, entry)], 1)
        pre_gate, pre_up = (joined @ weight.T for weight in weights)
    activation = _activate(codes, None, pre_gate, pre_up, codebook.shape[0])
    out = activation @ w_down.to(made_in).T
    return out.to(e.dtype), pre_gate.to(e.dtype), pre_up.to(e.dtype)


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
    hidden, made_in = e.shape[1], product_dtype(e.dtype)
    rows = e.to(made_in)
    pre_gate, pre_up = (rows @ weight[:, :hidden].to(made_in).T for weight in (w_gate, w_up))
    activation = _activate(codes, tables, pre_gate, pre_up, tables.shape[1])
    return (activation @ w_down.to(made_in).T).to(e.dtype)


def _activate(
    codes: Tensor, tables: Tensor | None, pre_gate: Tensor, pre_up: Tensor, num_codes: int
) -> Tensor:
    """silu(pre_gate) * pre_up, [N, I]; NaN rows where the code is -1.

    With ``tables`` ([2, K, I], accumulator's dtype) the code's rows are added to both
    pre-activations first, in place.
    """
    codes = codes.contiguous()
    activation = torch.empty_like(pre_gate)
    _C.merge_forward(
        dtype_code("gated_merge", pre_gate),
        address(pre_gate),
        address(pre_up),
        0 if tables is None else address(tables[0]),
        0 if tables is None else address(tables[1]),
        address(codes),
        address(activation),
        codes.shape[0],
        num_codes,
        pre_gate.shape[1],
        threads(),
    )
    return activation


@dataclass(frozen=True)
class _CodesInUse:
    """The codes that occur in a batch, the rows a table has to have."""

    codes: Tensor | None  # ascending, at least the U that occur; None stands for all K
    entry: Tensor  # every row's place among them, int64 [N]; -1 where it has no code

    @classmethod
    def of(cls, codes: Tensor, num_codes: int) -> _CodesInUse:
        """Those of ``codes``; all where leaving some out would save under 4 % of the products."""
        codes = codes.contiguous()
        rows = codes.shape[0]
        if rows >= 16 * num_codes:
            return cls(None, codes)
        used, entry = torch.zeros(num_codes, dtype=torch.int64), torch.empty_like(codes)
        count = _C.codes_in_use(address(codes), address(used), address(entry), rows, num_codes)
        # One at least, so that a row without a code has one to read.
        return cls(used[: max(count, 1)], entry)

    def table_pays(self) -> bool:
        """Whether N + U rows of half width cost less than N rows of the whole width."""
        if self.codes is None:
            return True
        return self.codes.shape[0] + _LEAST_SAVED_ROWS <= self.entry.shape[0]

    def rows_of(self, codebook: Tensor) -> Tensor:
        """The codebook's rows of these codes, [U, D]."""
        return codebook if self.codes is None else codebook[self.codes]


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
    Products are made as in the forward.
    """
    made_in = product_dtype(e.dtype)
    in_use = _CodesInUse.of(codes, codebook.shape[0])
    rows, grad = e.to(made_in), grad_out.to(made_in)
    if bool((in_use.entry < 0).any()):
        invalid = (in_use.entry < 0)[:, None]
        grad, rows = grad.masked_fill(invalid, 0.0), rows.masked_fill(invalid, 0.0)
    table = in_use.rows_of(codebook).to(made_in)
    weights = w_gate.to(made_in), w_up.to(made_in)
    d_gate, d_up, activation = _pre_gradients(
        grad @ w_down.to(made_in),
        pre_gate.to(made_in),
        pre_up.to(made_in),
        in_use.entry,
        len(table),
    )
    d_pre = d_gate, d_up
    through = _through_table if in_use.table_pays() else _through_joined
    d_e, d_code, d_weights = through(d_pre, rows, table, in_use.entry, weights, need_code_vectors)
    d_code = d_code.to(codebook.dtype)
    d_codebook = torch.zeros_like(codebook)
    if not need_code_vectors:
        used = in_use.codes
        d_codebook = d_code if used is None else d_codebook.index_copy_(0, used, d_code)
    d_code_probs = None
    if need_code_probs:
        of_all = [(codebook.to(made_in) @ weight[:, e.shape[1] :].T).T for weight in weights]
        d_code_probs = _both(d_pre, (of_all[0], of_all[1])).to(codebook.dtype)
    return (
        d_e.to(e.dtype),
        d_codebook,
        d_weights[0].to(w_gate.dtype),
        d_weights[1].to(w_up.dtype),
        (grad.T @ activation).to(w_down.dtype),
        d_code if need_code_vectors else None,
        d_code_probs,
    )


def _pre_gradients(
    d_activation: Tensor, pre_gate: Tensor, pre_up: Tensor, entry: Tensor, num_entries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both pre-activations and the activation computed anew, [N, I] each."""
    pre_gate, pre_up = pre_gate.contiguous(), pre_up.contiguous()
    d_gate, d_up, activation = (torch.empty_like(pre_gate) for _ in range(3))
    _C.merge_backward(
        dtype_code("gated_merge", pre_gate),
        address(d_activation),
        address(pre_gate),
        address(pre_up),
        address(entry),
        address(d_gate),
        address(d_up),
        address(activation),
        pre_gate.shape[0],
        num_entries,
        pre_gate.shape[1],
        threads(),
    )
    return d_gate, d_up, activation


def _through_table(
    d_pre: Pair, rows: Tensor, table: Tensor, entry: Tensor, weights: Pair, per_row: bool
) -> tuple[Tensor, Tensor, Pair]:
    """Gradients of e [N, H], of the code and of both weights, by the sums of d_pre of each code.

    The code's gradient is that of every row's vector [N, D], or of every code's [U, D].
    """
    hidden = rows.shape[1]
    e_halves = weights[0][:, :hidden], weights[1][:, :hidden]
    code_halves = weights[0][:, hidden:], weights[1][:, hidden:]
    d_gate, d_up = (segment_sum(d, entry, len(table)).to(rows.dtype) for d in d_pre)
    d_weights = torch.empty_like(weights[0]), torch.empty_like(weights[1])
    for d, d_table, d_weight in zip(d_pre, (d_gate, d_up), d_weights, strict=True):
        torch.mm(d.T, rows, out=d_weight[:, :hidden])
        torch.mm(d_table.T, table, out=d_weight[:, hidden:])
    d_code = _both(d_pre if per_row else (d_gate, d_up), code_halves)
    return _both(d_pre, e_halves), d_code, d_weights


def _through_joined(
    d_pre: Pair, rows: Tensor, table: Tensor, entry: Tensor, weights: Pair, per_row: bool
) -> tuple[Tensor, Tensor, Pair]:
    """As ``_through_table``, by products with the joined vectors [e; c]."""
    hidden = rows.shape[1]
    joined = torch.cat([rows, table.index_select(0, entry.clamp(min=0))], 1)
    d_joined = _both(d_pre, weights)
    d_e, d_vectors = d_joined[:, :hidden], d_joined[:, hidden:]
    if per_row:
        d_code = _own(d_vectors)
    else:
        d_code = segment_sum(d_vectors, entry, len(table))
    return _own(d_e), d_code, (d_pre[0].T @ joined, d_pre[1].T @ joined)


def _own(part: Tensor) -> Tensor:
    """A copy: a torch op's results may not share memory, and of one row any part is contiguous."""
    return part.clone(memory_format=torch.contiguous_format)


def _both(d_pre: Pair, weights: Pair) -> Tensor:
    """d_gate W_gate + d_up W_up."""
    return torch.addmm(d_pre[0] @ weights[0], d_pre[1], weights[1])
