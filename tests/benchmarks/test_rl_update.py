"""The contestants of the update benchmark do the same work."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is one of the contestants")

from benchmarks.train.rl_update import TOKENS, Bench, Case


def test_every_way_to_make_an_update_has_the_same_gradient(tmp_path):
    case = Case("tiny", 96, 2, 1, 512, prompts=2, group=4, steps=12, micro=4)
    bench = Bench(case, tmp_path)
    norms = {name: call() for name, call in bench.contestants().items()}
    assert norms.pop(TOKENS) > 0
    # Adam's first step is 1e-6 per weight: too little to be seen in the next contestant's norm.
    first = next(iter(norms.values()))
    assert first > 0
    for name, norm in norms.items():
        assert norm == pytest.approx(first, rel=1e-3), name
