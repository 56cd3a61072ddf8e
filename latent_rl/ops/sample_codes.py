"""sample_codes: draw one code per row from a tempered, truncated policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latent_rl.ops import _checks
from latent_rl.ops._library import accumulator, define
from latent_rl.ops.seeds import row_seeds

__all__ = ["SampleCodesOutput", "sample_codes"]

OP = "sample_codes"


class SampleCodesOutput(NamedTuple):
    """What ``sample_codes`` returns.

    Attributes:
        codes: int64 [B], -1 for rows that define no distribution.
        logprob: [B], under the distribution sampled from (tempered and truncated).
        logprob_full: [B], under softmax(logits).
        entropy: [B] in nats, of the distribution sampled from.
    """

    codes: Tensor
    logprob: Tensor
    logprob_full: Tensor
    entropy: Tensor


def _fake(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seeds: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator(logits)
    rows = logits.shape[:1]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=wide),
        logits.new_empty(rows, dtype=wide),
        logits.new_empty(rows, dtype=wide),
    )


define(
    OP,
    OP,
    "(Tensor logits, float temperature, int top_k, float top_p, float min_p, Tensor seeds,"
    " Tensor offsets) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def sample_codes(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,
    offset: int | Tensor = 0,
) -> SampleCodesOutput:
    """Draw a code per row: ``argmax_k logits_k / T + G_k`` over the codes that truncation keeps.

    The Gumbel noise comes from Philox4x32-10 keyed by the row's seed and counted by code and
    offset, so a row's draw does not depend on its batch and is the same on every backend.

    Args:
        logits: [B, K]; float32, bfloat16, float16 or float64; -inf masks a code.
        temperature: T > 0, or 0 for the most likely code (log-probability 0, entropy 0).
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: then keep the smallest set of likeliest codes whose mass reaches top_p; 1 keeps all.
        min_p: then keep codes at least min_p times as likely as the likeliest; 0 keeps all.
            Ties at a boundary keep the lowest ids. Order and meaning as in transformers.
        seed: int, int64 scalar tensor, or int64 [B] with one seed per row.
        offset: int, or int64 scalar or [B] tensor: the step. As a tensor it stays on the device,
            so that replays of a captured graph can draw anew.

    Returns:
        :class:`SampleCodesOutput`; floats are float32 (float64 for float64 input). Not
        differentiable: see ``code_logprobs``.

    Raises:
        TypeError: for dtypes. ValueError: for shapes, K = 0 or options out of range.
    """
    _checks.check_float(OP, "logits", logits)
    _checks.check_ndim(OP, "logits", logits, 2, "[B, K]")
    if logits.shape[1] == 0:
        raise ValueError(f"{OP}: logits must have at least one code, got K = 0")
    if not temperature >= 0 or temperature == float("inf"):
        raise ValueError(f"{OP}: temperature must be finite and at least 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"{OP}: top_k must be at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{OP}: top_p must lie in (0, 1], got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"{OP}: min_p must lie in [0, 1], got {min_p}")
    rows, device = logits.shape[0], logits.device
    seeds = row_seeds(seed, rows, device)
    offsets = offsets_of(OP, offset, rows, device)
    if logits.requires_grad:
        logits = logits.detach()
    return SampleCodesOutput(
        *torch.ops.latent_rl.sample_codes(
            logits, float(temperature), top_k, float(top_p), float(min_p), seeds, offsets
        )
    )


def offsets_of(op: str, offset: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """int64 [B] on ``device`` from an int, an int64 scalar or [B]; errors name ``op``."""
    if not isinstance(offset, Tensor):
        return torch.full((rows,), offset, dtype=torch.int64, device=device)
    if offset.dtype != torch.int64:
        raise TypeError(f"{op}: offset must be int64, got {offset.dtype}")
    if offset.ndim == 0:
        return offset.to(device).expand(rows)
    _checks.check_shape(op, "offset", offset, (rows,))
    return offset if offset.device == device else offset.to(device)
