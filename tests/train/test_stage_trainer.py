"""StageTrainer: learning, freezing, exact resumption, accumulation."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import TrainerCallback

from latent_rl.models import LatentActionModel
from latent_rl.train import (
    BehaviourCloning,
    InverseWarmup,
    Joint,
    ProjectorWarmup,
    StageArguments,
    StageTrainer,
    TaskSFT,
    build_feature_cache,
)
from latent_rl.train.checkpointing import COMPLETE_MARK, latest_checkpoint
from latent_rl.train.token_loss import response_mask
from tests.train.tiny_world import moved, snapshot, tiny_world


class StopAt(TrainerCallback):
    """An interruption: stop after a step, checkpoints written so far remain."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def arguments(path, **changes) -> StageArguments:
    settings = {
        "output_dir": str(path),
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "logging_steps": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    return StageArguments(**{**settings, **changes})


def train(world, stage, path, **changes) -> StageTrainer:
    trainer = StageTrainer(
        world.model, stage, arguments(path, **changes), world.rows, processing_class=world.processor
    )
    trainer.train()
    return trainer


LEARNING = [
    (InverseWarmup(learning_rate=3e-3), "ce", 0.6),
    (ProjectorWarmup(learning_rate=3e-3), "projected_gap", 0.6),
    (Joint(learning_rate=3e-3), "ce_paired", 0.6),
    (BehaviourCloning(learning_rate=3e-3), "loss", 0.6),
    (TaskSFT(learning_rate=3e-3, backbone_layers=1), "ce", 0.6),
]


@pytest.mark.parametrize(
    ("stage", "metric", "share"), LEARNING, ids=lambda v: getattr(v, "name", "")
)
def test_a_stage_learns_and_moves_only_its_modules(tmp_path, stage, metric, share):
    world = tiny_world(act=0.05)
    before = snapshot(world.model)
    trainer = train(world, stage, tmp_path)
    history = [entry[metric] for entry in trainer.state.log_history if metric in entry]
    assert len(history) == 6
    assert history[-1] < share * history[0]
    rooms = {".".join(n.split(".")[:2]) for n in moved(before, world.model)}
    expected = {
        "inverse_warmup": {"latent.inverse", "latent.quantizer", "latent.merge"},
        "projector_warmup": {"latent.projector"},
        "joint": {"latent.inverse", "latent.quantizer", "latent.merge", "latent.projector"},
        "behaviour_cloning": {"latent.policy"},
        "task_sft": {"backbone.model"},
    }
    assert rooms == expected[stage.name]


def test_inverse_warmup_reports_what_codes_are_worth(tmp_path):
    trainer = train(tiny_world(), InverseWarmup(learning_rate=3e-3), tmp_path)
    last = [entry for entry in trainer.state.log_history if "ce" in entry][-1]
    assert {"ce", "base_ce", "random_ce", "code_perplexity", "codes_used"} <= set(last)
    assert last["ce"] < last["base_ce"]
    assert last["ce"] < last["random_ce"]


def test_kmeans_places_the_codebook_before_the_first_step(tmp_path):
    world = tiny_world()
    codebook = world.model.latent.quantizer.codebook
    assert not codebook.initialised
    stage = InverseWarmup()
    trainer = StageTrainer(
        world.model, stage, arguments(tmp_path), world.rows, processing_class=world.processor
    )
    stage.prepare(world.model, trainer._preparation_batches())
    assert codebook.initialised
    weight = codebook.weight.clone()
    stage.prepare(world.model, trainer._preparation_batches())
    assert torch.equal(weight, codebook.weight)  # trained codes are not overwritten


@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
@pytest.mark.parametrize("stage", [InverseWarmup(1e-3), Joint(1e-3)], ids=lambda s: s.name)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stage, quantizer):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    whole = tiny_world(quantizer=quantizer)
    train(whole, stage, tmp_path / "whole", **saving)

    half = tiny_world(quantizer=quantizer)
    cut = arguments(tmp_path / "cut", **saving)
    StageTrainer(
        half.model,
        stage,
        cut,
        half.rows,
        processing_class=half.processor,
        callbacks=[StopAt(4)],  # one step is lost
    ).train()
    fresh = tiny_world(quantizer=quantizer)
    torch.manual_seed(1234)  # another process
    resumed = StageTrainer(
        fresh.model,
        stage,
        arguments(tmp_path / "cut", **saving),
        fresh.rows,
        processing_class=fresh.processor,
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert moved(snapshot(whole.model), fresh.model) == set()
    assert moved(snapshot(half.model), fresh.model)  # the comparison can fail


def test_checkpoints_hold_the_latent_modules_alone_and_reload(tmp_path):
    world = tiny_world()
    train(world, InverseWarmup(1e-3), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    directory = latest_checkpoint(tmp_path)
    assert directory.name == "checkpoint-2"
    names = {path.name for path in directory.iterdir()}
    assert {"latent_model.safetensors", "latent_config.json", COMPLETE_MARK} <= names
    assert not {"model.safetensors", "pytorch_model.bin", "training_args.bin"} & names
    loaded = LatentActionModel.from_pretrained(directory, copy.deepcopy(world.model.backbone))
    assert moved(snapshot(world.model.latent), loaded.latent) == set()


def test_tuned_backbone_layers_are_saved_and_resumed(tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    stage = TaskSFT(learning_rate=1e-3, backbone_layers=1)
    whole = tiny_world(act=0.05)
    train(whole, stage, tmp_path, **saving)
    assert (tmp_path / "checkpoint-4" / "tuned_backbone.safetensors").is_file()
    fresh = tiny_world(act=0.05)
    resumed = StageTrainer(
        fresh.model,
        stage,
        arguments(tmp_path, **saving),
        fresh.rows,
        processing_class=fresh.processor,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert moved(snapshot(whole.model), fresh.model) == set()


def test_only_complete_checkpoints_are_resumed_from(tmp_path):
    world = tiny_world()
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    train(world, InverseWarmup(1e-3), tmp_path, **saving)
    (tmp_path / "checkpoint-4" / COMPLETE_MARK).unlink()  # as if killed while saving
    assert latest_checkpoint(tmp_path).name == "checkpoint-2"
    trainer = StageTrainer(
        world.model,
        InverseWarmup(1e-3),
        arguments(tmp_path, **saving),
        world.rows,
        processing_class=world.processor,
    )
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"


def test_checkpoint_of_another_size_is_refused(tmp_path):
    small = tiny_world()
    train(small, InverseWarmup(1e-3), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    other = tiny_world(num_codes=16)
    trainer = StageTrainer(
        other.model,
        InverseWarmup(1e-3),
        arguments(tmp_path),
        other.rows,
        processing_class=other.processor,
    )
    with pytest.raises(ValueError, match="num_codes 8, the model has 16"):
        trainer.train(resume_from_checkpoint=True)


def test_rotation_keeps_the_newest(tmp_path):
    world = tiny_world()
    train(
        world,
        InverseWarmup(1e-3),
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]
    state = json.loads((tmp_path / "checkpoint-4" / COMPLETE_MARK).read_text())
    assert state["global_step"] == 4


def test_accumulation_weighs_tokens_not_micro_batches(tmp_path):
    """Two micro-batches of 4 rows give the gradient of one batch of 8, though lengths differ."""
    after = []
    for size, steps in ((8, 1), (4, 2)):
        world = tiny_world(act=0.05, vq_decay=None, vq_commitment=0.0, rows=8)
        stage = BehaviourCloning(learning_rate=1e-2)
        train(
            world,
            stage,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0.0,
        )
        after.append(snapshot(world.model.latent.policy))
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-5, atol=1e-7)


def test_learning_rate_and_schedule_come_from_the_stage_unless_given(tmp_path):
    world = tiny_world()
    trainer = StageTrainer(
        world.model,
        ProjectorWarmup(),
        arguments(tmp_path, max_steps=10),
        world.rows,
        processing_class=world.processor,
    )
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates[0] == pytest.approx(1e-3 * ProjectorWarmup().schedule.factor(4, 10))
    own = arguments(
        tmp_path,
        max_steps=2,
        logging_steps=1,
        learning_rate=0.5,
        use_stage_schedule=False,
        lr_scheduler_type="constant",
    )
    trainer = StageTrainer(
        world.model, ProjectorWarmup(), own, world.rows, processing_class=world.processor
    )
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == [0.5, 0.5]


def test_evaluation_reports_the_stage_s_metrics(tmp_path):
    world = tiny_world()
    cache = build_feature_cache(world.model, world.rows, world.collator)
    trainer = StageTrainer(
        world.model, InverseWarmup(), arguments(tmp_path), cache, eval_dataset=cache
    )
    before = snapshot(world.model)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_ce", "eval_base_ce", "eval_random_ce"} <= set(metrics)
    assert moved(before, world.model) == set()


@pytest.mark.parametrize("average", [True, False])
def test_tokens_weigh_the_same_on_every_process(tmp_path, monkeypatch, average):
    """Gradients are averaged over processes: the loss of one with half of the tokens of another
    must count for a third of the whole, not for half."""
    world = tiny_world()
    args = arguments(tmp_path, average_tokens_across_devices=average, probe=False)
    trainer = StageTrainer(
        world.model, InverseWarmup(), args, world.rows, processing_class=world.processor
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    tokens = int(response_mask(batch["labels"]).sum())

    def loss() -> torch.Tensor:
        torch.manual_seed(0)
        trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        world.model.eval()  # the codebook stays as it is
        return trainer.compute_loss(trainer.model.train(), batch).detach()

    alone = loss()
    monkeypatch.setattr(type(args), "world_size", 2)
    # What a gather gives where the other process has twice as many tokens.
    monkeypatch.setattr(trainer.accelerator, "gather", lambda mine: torch.cat([mine, 2 * mine]))
    assert tokens > 0
    torch.testing.assert_close(loss(), alone * (2 / 3 if average else 1.0), rtol=1e-5, atol=0)


def test_rows_are_cut_to_max_length(tmp_path):
    world = tiny_world()
    trainer = StageTrainer(
        world.model,
        InverseWarmup(),
        arguments(tmp_path, max_length=12),
        [row for row in world.rows if not row["images"]],
        processing_class=world.processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["inputs"]["input_ids"].shape[1] == 12
    with pytest.raises(ValueError, match="max_length must be >= 1 or None, got 0"):
        arguments(tmp_path, max_length=0)
    with pytest.raises(ValueError, match="max_length is for the trainer's own collator"):
        StageTrainer(
            world.model,
            InverseWarmup(),
            arguments(tmp_path, max_length=12),
            world.rows,
            data_collator=world.collator,
        )


def test_errors(tmp_path):
    world = tiny_world()
    with pytest.raises(ValueError, match="processing_class or data_collator"):
        StageTrainer(world.model, InverseWarmup(), arguments(tmp_path), world.rows)
    cache = build_feature_cache(world.model, world.rows, world.collator)
    with pytest.raises(ValueError, match="trains the backbone"):
        StageTrainer(world.model, TaskSFT(backbone_layers=1), arguments(tmp_path), cache)
