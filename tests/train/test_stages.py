"""Stage losses: values against a plain computation, gradients only where a stage says."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from latent_rl.train import (
    BehaviourCloning,
    CosineSchedule,
    InverseWarmup,
    Joint,
    ProjectorWarmup,
    TaskSFT,
    freeze,
    trace_of,
)
from latent_rl.train.freezing import set_training_modes
from latent_rl.train.stages.world_model import code_usage
from latent_rl.train.token_loss import next_tokens, response_mask
from tests.train.tiny_world import tiny_world

STAGES = [
    InverseWarmup(),
    ProjectorWarmup(),
    Joint(),
    BehaviourCloning(),
    TaskSFT(backbone_layers=1),
]
EXPECTED = {
    "inverse_warmup": {"latent.inverse", "latent.merge"},
    "projector_warmup": {"latent.projector"},
    "joint": {"latent.inverse", "latent.merge", "latent.projector"},
    "behaviour_cloning": {"latent.policy"},
    "task_sft": {"backbone"},
}


def room_of(name: str) -> str:
    return "backbone" if name.startswith("backbone") else ".".join(name.split(".")[:2])


@pytest.fixture(scope="module")
def world():
    return tiny_world(act=0.1)


@pytest.fixture(scope="module")
def batch(world):
    return world.collator(world.rows[:8])


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_gradient_flows_exactly_where_the_stage_says(world, batch, stage):
    model = world.model
    freeze(model, stage.trainable(model))
    set_training_modes(model, stage.trainable(model))
    output = stage.loss(model, batch)
    model.zero_grad(set_to_none=True)
    output.loss.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {room_of(name) for name in touched} == EXPECTED[stage.name]
    assert all(not value.requires_grad for value in output.metrics.values())
    model.eval()


def test_task_sft_trains_only_the_chosen_layers(world, batch):
    model, stage = world.model, TaskSFT(backbone_layers=1)
    freeze(model, stage.trainable(model))
    trained = [n for n, p in model.backbone.named_parameters() if p.requires_grad]
    assert trained
    assert all("layers.1." in name and "visual" not in name for name in trained)
    with pytest.raises(ValueError, match="backbone_layers must be between 1 and 2, got 9"):
        TaskSFT(backbone_layers=9).trainable(model)


@torch.no_grad()
def test_inverse_warmup_ce_is_the_backbone_s_loss_under_the_inferred_codes(world, batch):
    model = world.model.eval()
    metrics = InverseWarmup().loss(model, batch).metrics
    trace = trace_of(model, batch)
    state = model.state(trace)
    head = model.inverse(state, trace).head
    codes = model.inverse_codes(head).masked_fill(~response_mask(batch["labels"]), -1)
    logits = model(batch["inputs"], codes=codes).logits.float()
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), next_tokens(batch["labels"]).flatten(), ignore_index=-100
    )
    torch.testing.assert_close(metrics["ce"], expected, rtol=1e-5, atol=1e-5)


def test_the_action_before_a_token_explains_it_and_no_other_position_counts(world, batch):
    """Codes outside the response, and labels at pads, must not move the loss."""
    model, stage = world.model.eval(), InverseWarmup()
    labels = batch["labels"].clone()
    rows = torch.arange(len(labels))
    first = (labels != -100).long().argmax(1)
    expected = sum(int(n) for n in (labels != -100).sum(1))
    assert int(response_mask(labels).sum()) == expected
    assert response_mask(labels)[rows, first - 1].all()
    with torch.no_grad():
        full = stage.loss(model, batch).metrics["ce"]
        shorter = labels.clone()
        shorter[rows, first] = -100  # the first response token is no target any more
        assert stage.loss(model, {**batch, "labels": shorter}).metrics["ce"] != full


def test_entropy_term_raises_entropy(batch):
    world = tiny_world(act=0.1, quantizer="gumbel", gumbel_marginal_entropy=0.0)
    model = world.model
    freeze(model, InverseWarmup().trainable(model))
    set_training_modes(model, InverseWarmup().trainable(model))
    torch.manual_seed(0)
    light = InverseWarmup(entropy_weight=0.0).loss(model, batch)
    torch.manual_seed(0)
    heavy = InverseWarmup(entropy_weight=0.5).loss(model, batch)
    entropy = light.metrics["code_entropy"]
    assert entropy > 0
    torch.testing.assert_close(heavy.loss, light.loss - 0.5 * entropy)


def test_joint_mixes_rows_of_both_kinds_and_lives_with_one(world):
    model, stage = world.model.eval(), Joint()
    with torch.no_grad():
        both = stage.loss(model, world.collator(world.rows[:8])).metrics
        paired = stage.loss(model, world.collator([world.rows[0], world.rows[1]])).metrics
        text = stage.loss(model, world.collator([world.rows[3], world.rows[7]])).metrics
    assert both["ce_paired"] > 0
    assert both["ce_text"] > 0
    assert text["nll_cycle"] != 0
    # What a batch has no rows of is no metric of it: a 0 would enter the mean that is logged.
    of_pairs, of_text = {"ce_paired", "nll_to_image_text", "nll_to_text"}, {"ce_text", "nll_cycle"}
    assert both.keys() - paired.keys() == of_text
    assert both.keys() - text.keys() == of_pairs


def test_the_projector_learns_nothing_from_text_alone_and_says_nothing_of_it(world):
    batch = world.collator([world.rows[3], world.rows[7]])
    output = ProjectorWarmup().loss(world.model.eval(), batch)
    assert output.metrics == {}
    assert output.loss == 0


@torch.no_grad()
def test_projector_nll_by_hand(world, batch):
    model = world.model.eval()
    metrics = ProjectorWarmup().loss(model, batch).metrics
    view = batch["text_view"]
    hidden = model.encode(batch["inputs"]).hidden
    text_hidden = model.encode(view["inputs"]).hidden
    total, count = 0.0, 0
    for pair, row in enumerate(view["rows"].tolist()):
        for m in range(view["keep_mask"].shape[1]):
            if not view["keep_mask"][pair, m]:
                continue
            image_at, text_at = view["image_positions"][pair, m], view["text_positions"][pair, m]
            assert (
                batch["inputs"]["input_ids"][row, image_at]
                == (view["inputs"]["input_ids"][pair, text_at])
            )
            predicted = model.latent.projector.to_image_text(text_hidden[pair, text_at])
            error = (predicted.mean - hidden[row, image_at]) ** 2
            total += float((error * (-predicted.logvar).exp() + predicted.logvar).sum())
            count += 1
    assert count > 20
    assert metrics["nll_to_image_text"].item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_behaviour_cloning_targets(world, batch, soft):
    model = world.model.eval()
    with torch.no_grad():
        loss = BehaviourCloning(soft_targets=soft).loss(model, batch).loss
        trace = trace_of(model, batch)
        state = model.state(trace)
        mask = response_mask(batch["labels"])
        scores = model.code_scores(model.inverse(state, trace).head[mask])
        logprobs = model.policy_logits(state, trace)[mask].log_softmax(-1)
        weights = scores.softmax(-1) if soft else torch.nn.functional.one_hot(scores.argmax(-1), 8)
    torch.testing.assert_close(loss, -(weights * logprobs).sum(-1).mean(), rtol=1e-5, atol=1e-5)


def test_probes_measure_what_they_say_and_move_no_random_state(world, batch):
    model = world.model.eval()
    before = torch.random.get_rng_state()
    probed = InverseWarmup().probe(model, batch)
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.no_grad():
        trace = trace_of(model, batch)
        mask = response_mask(batch["labels"])
        logits = model.lm_logits(model.state(trace)[mask]).float()
        base = torch.nn.functional.cross_entropy(logits, next_tokens(batch["labels"])[mask])
    torch.testing.assert_close(probed["base_ce"], base)
    assert probed["random_ce"] != probed["base_ce"]


def test_a_model_without_projector_is_told_so(world, batch):
    bare = tiny_world(projector=False).model
    with pytest.raises(ValueError, match="projector_warmup: the model has no projector"):
        ProjectorWarmup().trainable(bare)


def test_batches_without_what_a_stage_needs_are_refused(world, batch):
    model = world.model
    with pytest.raises(ValueError, match="needs `text_view`"):
        ProjectorWarmup().loss(model, {k: v for k, v in batch.items() if k != "text_view"})
    with pytest.raises(ValueError, match="needs `labels`"):
        InverseWarmup().loss(model, {"inputs": batch["inputs"]})
    with pytest.raises(ValueError, match="`inputs` or `trace`"):
        InverseWarmup().loss(model, {"labels": batch["labels"]})


def test_code_usage_by_hand():
    usage = code_usage(torch.tensor([0, 0, 1, 1, -1]), 8)
    assert usage["codes_used"].item() == 2
    assert usage["code_perplexity"].item() == pytest.approx(2.0)


def test_schedule_by_hand():
    schedule = CosineSchedule(warmup=0.1, floor=0.1)
    assert schedule.factor(0, 100) == pytest.approx(0.1)
    assert schedule.factor(9, 100) == 1.0
    assert schedule.factor(10, 100) == 1.0
    assert schedule.factor(55, 100) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert schedule.factor(100, 100) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="floor"):
        CosineSchedule(floor=2.0)


def test_stages_are_frozen_settings():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Joint().nll_weight = 1.0  # type: ignore[misc]
    assert [stage.learning_rate for stage in STAGES] == [1e-4, 1e-3, 1e-4, 1e-4, 5e-5]
