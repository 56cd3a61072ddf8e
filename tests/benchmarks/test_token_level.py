"""The token-level update of the scale benchmarks is TRL's."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl", reason="TRL is what it is held against")

from benchmarks.train.rl_update import Bench, Case
from benchmarks.train.scale.token_level import TokenGrpo, TokenRollout


def test_its_gradient_is_that_of_trl(tmp_path):
    bench = Bench(Case("tiny", 96, 2, 1, 512, prompts=2, group=4, steps=12, micro=4), tmp_path)
    ids, mask = bench.completions
    assert not mask.all(), "rows of one length would hide how they are averaged"
    patches = len(bench.inputs["pixel_values"]) // bench.case.prompts
    prompts = bench._prompts(torch.arange(len(ids)))
    rollout = TokenRollout(prompts, ids, mask, bench.replay.advantages, patches)
    updates = TokenGrpo(copy.deepcopy(bench.model.backbone), rollout, micro=4, beta=bench.args.beta)
    assert updates.update() == pytest.approx(bench.token_update(), rel=1e-3)
