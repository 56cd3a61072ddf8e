"""Replay: the stored states score the rollout's codes as the rollout did."""

from __future__ import annotations

import json

import pytest
import torch

from latent_rl import ops
from latent_rl.data import render_prompts
from latent_rl.models import Trace
from latent_rl.train.replay import Replay, action_logits, join_traces, replay_trace
from tests.train.tiny_world import prompts, tiny_model


@pytest.fixture(scope="module")
def world():
    return tiny_model(act=0.3)


def rollout(model, processor, rows, steps):
    return model.generate(
        render_prompts(processor, rows), max_new_tokens=steps, seed=3, return_hidden=True
    )


def replay_of(model, generation, trace=None, first=None) -> Replay:
    rows = generation.codes.shape[0]
    return Replay(
        trace=replay_trace(model, trace or generation.trace, None),
        first=generation.prompt_length - 1 if first is None else first,
        codes=generation.codes,
        keep_mask=generation.completion_mask,
        advantages=torch.arange(rows).float(),
        seeds=torch.arange(rows),
    )


@torch.no_grad()
def scores(model, replay: Replay) -> torch.Tensor:
    logits = action_logits(model.latent.policy, replay)
    return ops.code_logprobs(logits, replay.codes).logprob[replay.keep_mask]


def test_rescored_logprobs_equal_those_of_the_rollout(world):
    model, processor = world
    generation = rollout(model, processor, prompts(6), 7)
    expected = generation.logprobs[generation.completion_mask]
    # Cached decoding against one full pass: float32 sums in another order.
    torch.testing.assert_close(
        scores(model, replay_of(model, generation)), expected, rtol=1e-4, atol=1e-5
    )
    shifted = replay_of(model, generation, first=generation.prompt_length - 2)
    assert (scores(model, shifted) - expected).abs().max() > 1e-3  # off by one is seen


def test_selecting_rows_selects_everything(world):
    model, processor = world
    replay = replay_of(model, rollout(model, processor, prompts(6), 5))
    picked = replay.select(torch.tensor([4, 1]))
    assert len(picked) == 2
    assert picked.advantages.tolist() == [4.0, 1.0]
    assert picked.seeds.tolist() == [4, 1]
    whole = torch.where(
        replay.keep_mask,
        ops.code_logprobs(action_logits(model.latent.policy, replay), replay.codes).logprob,
        0.0,
    )
    torch.testing.assert_close(
        scores(model, picked),
        whole[[4, 1]][picked.keep_mask].detach(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_joined_rollouts_score_as_they_did_apart(world):
    model, processor = world
    short = rollout(model, processor, prompts(2, image=False)[:1], 3)
    long = rollout(model, processor, prompts(4)[1:4], 6)
    parts = [short, long]
    assert short.prompt_length != long.prompt_length
    trace = join_traces(
        [part.trace for part in parts],
        [part.prompt_length for part in parts],
        [part.codes.shape[1] for part in parts],
    )
    steps = max(part.codes.shape[1] for part in parts)
    codes = torch.cat(
        [torch.nn.functional.pad(p.codes, (0, steps - p.codes.shape[1]), value=-1) for p in parts]
    )
    joined = Replay(
        trace=replay_trace(model, trace, None),
        first=max(part.prompt_length for part in parts) - 1,
        codes=codes,
        keep_mask=codes >= 0,
        advantages=torch.zeros(4),
        seeds=torch.zeros(4, dtype=torch.int64),
    )
    expected = torch.cat([part.logprobs[part.completion_mask] for part in parts])
    torch.testing.assert_close(scores(model, joined), expected, rtol=1e-4, atol=1e-5)


def test_prepared_masks_cannot_be_joined():
    trace = Trace(
        torch.zeros(1, 2, 4),
        {"attention_mask": torch.zeros(1, 1, 2, 2)},
        torch.ones(1, 2, dtype=torch.bool),
        torch.tensor([True]),
    )
    with pytest.raises(ValueError, match="dynamic_sampling=False"):
        join_traces([trace, trace], [1, 1], [2, 2])


def test_a_replay_survives_its_state(world):
    model, processor = world
    replay = replay_of(model, rollout(model, processor, prompts(6), 5))
    tensors, meta = replay.state()
    assert all(value.is_contiguous() for value in tensors.values())
    back = Replay.from_state(tensors, json.loads(json.dumps(meta)), model)
    assert torch.equal(scores(model, back), scores(model, replay))
    assert back.seeds.tolist() == replay.seeds.tolist()
    assert back.ref_logits is None
    with pytest.raises(ValueError, match="format must be 1, got 7"):
        Replay.from_state(tensors, {**meta, "format": 7}, model)
    tensors.pop("codes")
    with pytest.raises(ValueError, match="codes"):
        Replay.from_state(tensors, meta, model)
