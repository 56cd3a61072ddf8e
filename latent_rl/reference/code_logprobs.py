"""Reference of code_logprobs."""

from __future__ import annotations

import torch
from torch import Tensor


def _valid_rows(logits: Tensor, codes: Tensor, ref_logits: Tensor | None) -> Tensor:
    broken = logits.isnan() | (logits == torch.inf)
    valid = ~broken.any(-1) & (logits > -torch.inf).any(-1) & (codes >= 0)
    if ref_logits is not None:
        broken = ref_logits.isnan() | (ref_logits == torch.inf)
        valid &= ~broken.any(-1) & (ref_logits > -torch.inf).any(-1)
    return valid


def _distribution(logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [N, K] and their logs, with 0 in place of -inf where a code is masked."""
    clean = torch.where(valid[:, None], logits, 0).double()
    log_probs = clean.log_softmax(-1)
    return log_probs.exp(), log_probs


def code_logprobs_forward(
    logits: Tensor, codes: Tensor, ref_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the codes, entropy, and exact KL(softmax(logits) || softmax(ref)).

    Args:
        logits: [N, K]; -inf masks a code. codes: int64 [N]. ref_logits: [N, K] or None.

    Returns:
        logprob [N], entropy [N] in nats, kl [N] in nats (zeros without ``ref_logits``). Rows with
        code -1 or without a distribution give NaN.
    """
    accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
    valid = _valid_rows(logits, codes, ref_logits)
    probs, log_probs = _distribution(logits, valid)
    logprob = log_probs.gather(-1, codes.clamp(min=0)[:, None])[:, 0]
    entropy = torch.special.entr(probs).sum(-1)
    if ref_logits is None:
        kl = torch.zeros_like(entropy)
    else:
        ref_log_probs = _distribution(ref_logits, valid)[1]
        kl = torch.where(probs > 0, probs * (log_probs - ref_log_probs), 0).sum(-1)
    out = [v.masked_fill(~valid, torch.nan).to(accumulator) for v in (logprob, entropy, kl)]
    return out[0], out[1], out[2]


def code_logprobs_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    codes: Tensor,
    ref_logits: Tensor | None,
) -> Tensor:
    """Gradient of logits [N, K]; the reference gets none, invalid rows get zero.

    d logprob = onehot - p; d entropy = -p (log p + H); d kl = p (log p - log q - KL).
    """
    valid = _valid_rows(logits, codes, ref_logits)
    probs, log_probs = _distribution(logits, valid)
    safe_log = torch.where(probs > 0, log_probs, 0)
    one_hot = torch.nn.functional.one_hot(codes.clamp(min=0), logits.shape[-1])
    grads = [
        torch.where(valid, grad, 0).double()[:, None]
        for grad in (grad_logprob, grad_entropy, grad_kl)
    ]
    entropy = -(probs * safe_log).sum(-1, keepdim=True)
    dlogits = grads[0] * (one_hot - probs) - grads[1] * probs * (safe_log + entropy)
    if ref_logits is not None:
        gap = torch.where(probs > 0, log_probs - _distribution(ref_logits, valid)[1], 0)
        kl = (probs * gap).sum(-1, keepdim=True)
        # An infinite KL that the loss does not use must not make its gradient NaN.
        used = (probs > 0) & (grads[2] != 0)
        dlogits += torch.where(used, grads[2] * probs * (gap - kl), 0)
    return torch.where(valid[:, None], dlogits, 0).to(logits.dtype)
