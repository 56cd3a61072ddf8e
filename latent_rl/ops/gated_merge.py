"""gated_merge: one block of the world model, with hard codes as a table lookup."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_rl.ops import _checks
from latent_rl.ops._library import accumulator, define

__all__ = ["gated_merge", "gated_merge_step", "merge_tables"]

OP = "gated_merge"


def _merge_fake(
    e: Tensor,
    codes: Tensor,
    codebook: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inner = (e.shape[0], w_gate.shape[0])
    return e.new_empty(e.shape), e.new_empty(inner), e.new_empty(inner)


def _backward_fake(
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
) -> tuple[Tensor, ...]:
    n = e.shape[0]
    return (
        e.new_empty(e.shape),
        codebook.new_empty(codebook.shape),
        w_gate.new_empty(w_gate.shape),
        w_up.new_empty(w_up.shape),
        w_down.new_empty(w_down.shape),
        # A torch op cannot return an optional tensor; an unwanted gradient is empty.
        e.new_empty((n, codebook.shape[1]) if need_code_vectors else (0,)),
        e.new_empty((n, codebook.shape[0]) if need_code_probs else (0,)),
    )


def _step_fake(
    e: Tensor, codes: Tensor, tables: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    return e.new_empty(e.shape)


def _fill_absent(result: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    like = next(value for value in result if value is not None)
    return tuple(like.new_empty(0) if value is None else value for value in result)


define(
    OP,
    "gated_merge_forward",
    "(Tensor e, Tensor codes, Tensor codebook, Tensor w_gate, Tensor w_up, Tensor w_down)"
    " -> (Tensor, Tensor, Tensor)",
    _merge_fake,
)
define(
    OP,
    "gated_merge_step",
    "(Tensor e, Tensor codes, Tensor tables, Tensor w_gate, Tensor w_up, Tensor w_down) -> Tensor",
    _step_fake,
)
define(
    OP,
    "gated_merge_backward",
    "(Tensor grad_out, Tensor e, Tensor codes, Tensor codebook, Tensor w_gate, Tensor w_up,"
    " Tensor w_down, Tensor pre_gate, Tensor pre_up, bool need_code_vectors,"
    " bool need_code_probs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    finish=_fill_absent,
)


class _GatedMerge(torch.autograd.Function):
    """The forward op with the stand-ins of the code as extra inputs of its backward."""

    @staticmethod
    def forward(
        e: Tensor,
        codes: Tensor,
        codebook: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        code_vectors: Tensor | None,
        code_probs: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out: tuple[Tensor, Tensor, Tensor] = torch.ops.latent_rl.gated_merge_forward(
            e, codes, codebook, w_gate, w_up, w_down
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        e, codes, codebook, w_gate, w_up, w_down, code_vectors, code_probs = inputs
        _, pre_gate, pre_up = output
        ctx.save_for_backward(e, codes, codebook, w_gate, w_up, w_down, pre_gate, pre_up)
        ctx.stand_ins = (code_vectors is not None, code_probs is not None)
        ctx.mark_non_differentiable(pre_gate, pre_up)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 8
        vectors, probs = ctx.stand_ins
        de, dcodebook, dgate, dup, ddown, dvectors, dprobs = (
            torch.ops.latent_rl.gated_merge_backward(grads[0], *ctx.saved_tensors, vectors, probs)
        )
        return (
            de,
            None,
            dcodebook,
            dgate,
            dup,
            ddown,
            dvectors if vectors else None,
            dprobs if probs else None,
        )


def gated_merge(
    e: Tensor,
    codes: Tensor,
    codebook: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    code_vectors: Tensor | None = None,
    code_probs: Tensor | None = None,
) -> Tensor:
    """Merge a hidden state with its code: ``W_down(silu(W_gate [e; c]) * (W_up [e; c]))``.

    Since c takes only K values, ``W [e; c] = W_e e + T[code]`` with the K-row table
    ``T = codebook W_c^T``: half of the two widest products becomes a gather, and in the backward
    a segment sum and K-row products.

    Args:
        e: [..., H]; float32, bfloat16, float16 or float64.
        codes: int64 [...], in [-1, K); -1 gives a NaN row.
        codebook: [K, D].
        w_gate, w_up: [I, H + D]; the first H columns meet e, the last D the code.
        w_down: [H, I].
        code_vectors: [..., D] whose value is codebook[codes]: a quantizer's straight-through
            output. The gradient of the code then goes there and none to ``codebook``.
        code_probs: [..., K] standing for the one-hot codes: receives ``d out / d onehot``, while
            ``codebook`` keeps its gradient. Excludes ``code_vectors``.

    Returns:
        [..., H], in e's dtype.

    Raises:
        TypeError: for dtypes. ValueError: for shapes, devices, code range (checked on the CPU) or
            when both stand-ins are given.
    """
    _check(e, codes, codebook, (w_gate, w_up, w_down), code_vectors, code_probs)
    flat = [
        None if t is None else t.reshape(-1, t.shape[-1]) for t in (e, code_vectors, code_probs)
    ]
    inputs = (flat[0], codes.reshape(-1), codebook, w_gate, w_up, w_down)
    wanted = (*inputs, flat[1], flat[2])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted):
        apply: Any = _GatedMerge.apply
        out: Tensor = apply(*wanted)[0]
    else:
        # Half of the Python between the products is torch's autograd.Function.
        out = torch.ops.latent_rl.gated_merge_forward(*inputs)[0]
    return out.reshape(e.shape)


@torch.no_grad()
def merge_tables(codebook: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """The code's share of both wide products for every code: ``codebook W_c^T``, twice.

    Args:
        codebook: [K, D].
        w_gate, w_up: [I, H + D], same dtype and device.

    Returns:
        [2, K, I], gate before up; float32 (float64 for float64), contiguous, without gradient.

    Raises:
        TypeError: for dtypes. ValueError: for shapes and devices.
    """
    _checks.check_float(OP, "codebook", codebook)
    _checks.check_ndim(OP, "codebook", codebook, 2, "[K, D]")
    _checks.check_codebook(OP, codebook)
    width = codebook.shape[1]
    for name, weight in (("w_gate", w_gate), ("w_up", w_up)):
        _checks.check_float(OP, name, weight)
        _checks.check_like(OP, name, weight, "codebook", codebook)
        _checks.check_ndim(OP, name, weight, 2, "[I, H + D]")
        if weight.shape[1] <= width:
            raise ValueError(
                f"{OP}: {name} must have shape [I, H + D] with D = {width} and H >= 1, "
                f"got {list(weight.shape)}"
            )
    _checks.check_shape(OP, "w_up", w_up, tuple(w_gate.shape))
    wide = accumulator(codebook)
    with torch.autocast(codebook.device.type, enabled=False):
        rows = codebook.to(wide)
        return torch.stack([rows @ weight[:, -width:].to(wide).T for weight in (w_gate, w_up)])


def gated_merge_step(
    e: Tensor, codes: Tensor, tables: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """``gated_merge`` for a decoding step: the code's share of the products is looked up.

    Where rows are few, the K rows of the table cost as much as the products themselves. Made once
    for all steps (:func:`merge_tables`), half of the two widest weights is never read again. Not
    differentiable.

    Args:
        e: [..., H]; float32, bfloat16, float16 or float64.
        codes: int64 [...], in [-1, K); -1 gives a NaN row.
        tables: [2, K, I] of ``merge_tables`` for these weights, contiguous.
        w_gate, w_up: [I, H + D], of which the first H columns are read.
        w_down: [H, I].

    Returns:
        [..., H], in e's dtype; equal to ``gated_merge`` up to the rounding of the products.

    Raises:
        TypeError: for dtypes. ValueError: for shapes, devices or code range (checked on the CPU).
    """
    _checks.check_float(OP, "e", e)
    if e.ndim < 1:
        raise ValueError(f"{OP}: e must have shape [..., H], got a scalar")
    _checks.check_codes(OP, "codes", codes)
    _checks.check_shape(OP, "codes", codes, tuple(e.shape[:-1]))
    _checks.check_device(OP, "codes", codes, "e", e)
    hidden, inner = e.shape[-1], w_gate.shape[0]
    for name, weight in (("w_gate", w_gate), ("w_up", w_up), ("w_down", w_down)):
        _checks.check_float(OP, name, weight)
        _checks.check_like(OP, name, weight, "e", e)
        _checks.check_ndim(OP, name, weight, 2, "[H, I]" if name == "w_down" else "[I, H + D]")
    if w_gate.shape[1] <= hidden:
        raise ValueError(
            f"{OP}: w_gate must have shape [I, H + D] with H = {hidden} and D >= 1, "
            f"got {list(w_gate.shape)}"
        )
    _checks.check_shape(OP, "w_up", w_up, tuple(w_gate.shape))
    _checks.check_shape(OP, "w_down", w_down, (hidden, inner))
    _checks.check_device(OP, "tables", tables, "e", e)
    if tables.dtype != accumulator(e):
        raise TypeError(f"{OP}: tables must be {accumulator(e)}, got {tables.dtype}")
    _checks.check_ndim(OP, "tables", tables, 3, "[2, K, I]")
    _checks.check_shape(OP, "tables", tables, (2, tables.shape[1], inner))
    if not tables.is_contiguous():
        raise ValueError(f"{OP}: tables must be contiguous, got strides {tables.stride()}")
    _checks.check_code_range(OP, "codes", codes, tables.shape[1])
    out: Tensor = torch.ops.latent_rl.gated_merge_step(
        e.detach().reshape(-1, hidden),
        codes.reshape(-1),
        tables.detach(),
        w_gate.detach(),
        w_up.detach(),
        w_down.detach(),
    )
    return out.reshape(e.shape)


def _check(
    e: Tensor,
    codes: Tensor,
    codebook: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    code_vectors: Tensor | None,
    code_probs: Tensor | None,
) -> None:
    _checks.check_float(OP, "e", e)
    if e.ndim < 1:
        raise ValueError(f"{OP}: e must have shape [..., H], got a scalar")
    _checks.check_codes(OP, "codes", codes)
    _checks.check_shape(OP, "codes", codes, tuple(e.shape[:-1]))
    _checks.check_device(OP, "codes", codes, "e", e)
    _checks.check_float(OP, "codebook", codebook)
    _checks.check_ndim(OP, "codebook", codebook, 2, "[K, D]")
    _checks.check_codebook(OP, codebook)
    _checks.check_code_range(OP, "codes", codes, codebook.shape[0])
    for name, weight in zip(("w_gate", "w_up", "w_down"), weights, strict=True):
        _checks.check_float(OP, name, weight)
        _checks.check_like(OP, name, weight, "e", e)
    _checks.check_like(OP, "codebook", codebook, "e", e)
    hidden, width = e.shape[-1], codebook.shape[1]
    w_gate, w_up, w_down = weights
    _checks.check_ndim(OP, "w_gate", w_gate, 2, "[I, H + D]")
    inner = w_gate.shape[0]
    _checks.check_shape(OP, "w_gate", w_gate, (inner, hidden + width))
    _checks.check_shape(OP, "w_up", w_up, (inner, hidden + width))
    _checks.check_shape(OP, "w_down", w_down, (hidden, inner))
    if code_vectors is not None and code_probs is not None:
        raise ValueError(f"{OP}: give code_vectors or code_probs, not both")
    for name, stand_in, size in (
        ("code_vectors", code_vectors, width),
        ("code_probs", code_probs, codebook.shape[0]),
    ):
        if stand_in is not None:
            _checks.check_float(OP, name, stand_in)
            _checks.check_like(OP, name, stand_in, "e", e)
            _checks.check_shape(OP, name, stand_in, (*codes.shape, size))
