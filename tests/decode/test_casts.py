"""Under autocast the engine reads copies of weights: the same numbers, of the weights of now."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latent_rl.decode import Decoder
from latent_rl.decode.casts import WeightCasts
from latent_rl.decode.workspace import Workspace
from latent_rl.models import LatentGeneration
from tests.models.conftest import Case, build

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "seed": 7}


@pytest.fixture
def qwen() -> Case:
    """Float32 everywhere, with a merge and a policy that make a difference."""
    case = build("qwen2_5_vl")
    assert {p.dtype for p in case.model.latent.policy.parameters()} == {torch.float32}
    return case


def said(decoder: Decoder, case: Case, *, autocast: bool = True) -> LatentGeneration:
    """A rollout; a trainer's have an autocast of their own each."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return decoder.generate(case.inputs, **SETTINGS).generation


def same(mine: LatentGeneration, theirs: LatentGeneration) -> None:
    """To the bit."""
    for name in ("completion_ids", "codes", "logprobs", "entropies"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


def projection(case: Case) -> nn.Linear:
    """A product of the policy's."""
    found: nn.Linear = case.model.latent.policy.tower.layers[-1].mlp.down_proj
    return found


def test_copies_change_no_number(qwen, monkeypatch) -> None:
    with_copies = said(Decoder(qwen.model), qwen)
    monkeypatch.setattr(Workspace, "weights", lambda self: nullcontext())
    same(with_copies, said(Decoder(qwen.model), qwen))


def test_steps_read_copies_and_the_weights_are_back_afterwards(qwen) -> None:
    layer, block = projection(qwen), qwen.model.latent.merge.blocks[0]
    weights = [layer.weight, block.w_gate, qwen.model.latent.policy.head.weight]
    seen: list[torch.dtype] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight.dtype))
    said(Decoder(qwen.model), qwen)
    # The prompts' forward reads the weights themselves, every step behind it the copies.
    assert seen[0] == torch.float32
    assert set(seen[-5:]) == {torch.bfloat16}
    now = [layer.weight, block.w_gate, qwen.model.latent.policy.head.weight]
    assert all(mine is theirs for mine, theirs in zip(weights, now, strict=True))


def test_the_weights_are_back_after_an_error(qwen) -> None:
    layer = projection(qwen)
    weight = layer.weight
    decoder = Decoder(qwen.model)

    def fails(module: nn.Module, args: Any) -> None:
        if module.weight.dtype == torch.bfloat16:
            raise RuntimeError("in a step")

    handle = layer.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in a step"):
        said(decoder, qwen)
    handle.remove()
    assert layer.weight is weight
    same(said(decoder, qwen), said(Decoder(qwen.model), qwen))


def test_an_update_is_seen_at_the_same_address(qwen) -> None:
    decoder = Decoder(qwen.model)
    before = said(decoder, qwen)
    space = decoder._workspace
    assert space is not None
    copies = space._casts
    assert copies is not None
    with torch.no_grad():
        projection(qwen).weight.neg_().mul_(8)
    after = said(decoder, qwen)
    assert space._casts is copies
    assert not torch.equal(before.logprobs, after.logprobs)
    same(after, said(Decoder(qwen.model), qwen))


def test_other_weights_are_copied_anew(qwen) -> None:
    decoder = Decoder(qwen.model)
    said(decoder, qwen)
    layers = qwen.model.latent.policy.tower.layers
    old = layers[-1].mlp.down_proj
    layers[-1].mlp.down_proj = nn.Linear(old.in_features, old.out_features, bias=False)
    same(said(decoder, qwen), said(Decoder(qwen.model), qwen))


def test_with_and_without_autocast_in_turns(qwen) -> None:
    decoder = Decoder(qwen.model)
    for autocast in (True, False, True):
        fresh = said(Decoder(qwen.model), qwen, autocast=autocast)
        same(said(decoder, qwen, autocast=autocast), fresh)
    space = decoder._workspace
    assert space is not None
    # A captured step keeps the dtypes it was captured in.
    assert len({id(step) for step in space._steps.values()}) == 2


def test_copies_are_in_the_plan(qwen) -> None:
    decoder = Decoder(qwen.model)
    sizes = {"requests": 2, "prompt_tokens": 8, "new_tokens": 4}
    plain = decoder.plan(**sizes)
    with torch.autocast("cpu", torch.bfloat16):
        planned = decoder.plan(**sizes)
    assert plain.casts_bytes == 0
    copies = WeightCasts(qwen.model, torch.bfloat16)
    assert planned.casts_bytes == copies.num_bytes
    assert planned.new_bytes == plain.new_bytes + copies.num_bytes
    merge = sum(b.w_gate.numel() + b.w_up.numel() + b.w_down.numel() for b in _blocks(qwen))
    tower: list[Tensor] = [
        p
        for m in qwen.model.latent.policy.tower.modules()
        if isinstance(m, nn.Linear)
        for p in m.parameters()
    ]
    assert copies.num_bytes == 2 * (merge + sum(p.numel() for p in tower))


def _blocks(case: Case) -> list[Any]:
    return list(case.model.latent.merge.blocks)
