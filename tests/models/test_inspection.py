"""What the codes mean."""

from __future__ import annotations

import pytest
import torch

from latent_rl.models import code_top_tokens
from tests.models.conftest import NUM_CODES, Case, build


def test_top_tokens_against_the_definition(qwen: Case) -> None:
    model = qwen.model
    trace = model.encode(qwen.inputs)
    state = model.state(trace)[trace.keep_mask]
    out = code_top_tokens(model, state, top=4, chunk=7)
    assert out.token_ids.shape == out.lift.shape == out.prob.shape == (NUM_CODES, 4)
    code = 5
    codes = torch.full(state.shape[:1], code)
    prob = model.lm_logits(model.merge(state, codes)).softmax(-1).mean(0)
    lift = prob - model.lm_logits(state).softmax(-1).mean(0)
    best = lift.topk(4)
    assert torch.equal(out.token_ids[code], best.indices)
    torch.testing.assert_close(out.lift[code], best.values)
    torch.testing.assert_close(out.prob[code], prob[best.indices])
    assert out.token_ids[:, 0].unique().numel() > 1


def test_codes_that_do_nothing_lift_nothing() -> None:
    case = build("qwen2_5_vl")
    for block in case.model.latent.merge.blocks:
        torch.nn.init.zeros_(block.w_down)
    trace = case.model.encode(case.inputs)
    out = code_top_tokens(case.model, case.model.state(trace)[trace.keep_mask])
    assert not out.lift.any()


def test_no_rows_is_refused(qwen: Case) -> None:
    with pytest.raises(ValueError, match=r"must be \[N >= 1, H\], got \[0, 64\]"):
        code_top_tokens(qwen.model, torch.zeros(0, 64))
