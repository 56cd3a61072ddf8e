"""The report on whether codes matter, on a model whose answer is known."""

import math
from dataclasses import astuple

import pytest
import torch

from latent_rl.data import ConversationCollator
from latent_rl.eval import world_model_report
from latent_rl.models import LatentActionModel, LatentConfig
from tests.tiny_models import tiny_image, tiny_vlm


@pytest.fixture
def world():
    vlm = tiny_vlm("qwen2_5_vl")
    torch.manual_seed(0)
    config = LatentConfig(num_codes=8, inverse_layers=1, policy_layers=1, merge_blocks=1)
    model = LatentActionModel(vlm.model, config)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "What is it?"},
                {"role": "assistant", "content": "It is even. yes"},
            ],
            "images": [tiny_image(0)],
        },
        {
            "messages": [
                {"role": "user", "content": "Hello?"},
                {"role": "assistant", "content": "no"},
            ]
        },
    ]
    return model, [ConversationCollator(vlm.processor)(rows)]


def test_an_untrained_latent_path_changes_nothing(world) -> None:
    model, batches = world
    report = world_model_report(model, batches)
    labels = batches[0]["labels"]
    assert report.tokens == int((labels[:, 1:] != -100).sum())
    for value in (report.inverse, report.random, report.marginal):
        assert value == pytest.approx(report.base, rel=1e-5)


def test_base_equals_the_backbones_own_loss(world) -> None:
    model, batches = world
    loss = model.backbone(**batches[0]["inputs"], labels=batches[0]["labels"]).loss
    assert world_model_report(model, batches).base == pytest.approx(loss.item(), rel=1e-4)


def test_the_marginal_is_a_mixture_over_codes(world) -> None:
    model, batches = world
    with torch.no_grad():
        for parameter in model.latent.merge.parameters():
            parameter.normal_(std=0.05)
    report = world_model_report(model, batches, rows_per_chunk=16)
    # Up to rounding: products of another number of rows may add in another order.
    whole = world_model_report(model, batches, rows_per_chunk=10**6)
    assert astuple(report) == pytest.approx(astuple(whole), rel=1e-6)
    # By hand: one likelihood per code, weighted by the policy.
    batch = batches[0]
    trace = model.encode(batch["inputs"])
    state = model.state(trace)
    acts = torch.zeros_like(batch["labels"], dtype=torch.bool)
    acts[:, :-1] = batch["labels"][:, 1:] != -100
    targets = batch["labels"][:, 1:][acts[:, :-1]]
    policy = model.policy_logits(state, trace)[acts].softmax(-1)
    likelihood = torch.zeros(len(targets))
    for code in range(8):
        codes = torch.full((len(targets),), code)
        probs = model.lm_logits(model.merge(state[acts], codes)).softmax(-1)
        likelihood += policy[:, code] * probs.gather(-1, targets[:, None])[:, 0]
    expected = -likelihood.log().mean().item()
    assert report.marginal == pytest.approx(expected, rel=1e-4)
    assert math.isfinite(report.random)


def test_batches_without_responses_are_refused(world) -> None:
    model, batches = world
    empty = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    with pytest.raises(ValueError, match="no batch holds a response token"):
        world_model_report(model, [empty])
