"""What the codes mean: the tokens each code makes more likely."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from latent_rl.models.latent_action_model import LatentActionModel


class CodeTokens(NamedTuple):
    """Per code, its top tokens.

    Attributes:
        token_ids: int64 [K, top], most raised first.
        lift: float32 [K, top], mean over the rows of p(token | e, code) - p(token | e).
        prob: float32 [K, top], mean over the rows of p(token | e, code).
    """

    token_ids: Tensor
    lift: Tensor
    prob: Tensor


@torch.no_grad()
def code_top_tokens(
    model: LatentActionModel, state: Tensor, *, top: int = 10, chunk: int = 256
) -> CodeTokens:
    """The tokens whose probability each code raises most, over the states given.

    Args:
        model: the model.
        state: [N, H] states to try every code on (``model.state(trace)[mask]``), N >= 1.
        top: tokens per code.
        chunk: rows whose logits [chunk, V] are held at once.

    Raises:
        ValueError: for no rows.
    """
    if state.ndim != 2 or state.shape[0] == 0:
        raise ValueError(f"code_top_tokens: state must be [N >= 1, H], got {list(state.shape)}")
    base = _mean_probs(model, state, None, chunk)
    rows = []
    for code in range(model.latent_config.num_codes):
        prob = _mean_probs(model, state, code, chunk)
        lift, ids = (prob - base).topk(min(top, prob.shape[0]))
        rows.append((ids, lift, prob[ids]))
    ids, lift, prob = (torch.stack(column) for column in zip(*rows, strict=True))
    return CodeTokens(ids, lift, prob)


def _mean_probs(model: LatentActionModel, state: Tensor, code: int | None, chunk: int) -> Tensor:
    total: Tensor | None = None
    for start in range(0, state.shape[0], chunk):
        part = state[start : start + chunk]
        if code is not None:
            codes = torch.full(part.shape[:1], code, dtype=torch.int64, device=part.device)
            part = model.merge(part, codes)
        summed = model.lm_logits(part).softmax(-1).sum(0)
        total = summed if total is None else total + summed
    return torch.as_tensor(total) / state.shape[0]
