"""Updates that are not finite or explode stop a run before the weights move."""

from __future__ import annotations

import errno
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from latent_rl.train import InverseWarmup, StageTrainer
from latent_rl.train.arguments import BaseArguments
from latent_rl.train.divergence import MAX_SKIPPED, Limits, TrainingDivergedError, UpdateWatch
from tests.train.test_rl_trainer import config, make
from tests.train.test_stage_trainer import StopAt, arguments
from tests.train.tiny_world import moved, snapshot, tiny_world

# 2 micro-batches per update and per pass; the third update is in the middle of a rollout.
SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_iterations": 3,
    "save_strategy": "steps",
    "save_steps": 2,
}


class Poison:
    """From its n-th use in an update on, the policy's states hold a value."""

    def __init__(self, model, number, value=math.nan):
        self.number, self.value, self.uses = number, value, 0
        self.handle = model.latent.policy.head.register_forward_hook(self)
        self.before = {}
        self.model = model

    def __call__(self, module, inputs, output):
        if not torch.is_grad_enabled():
            return None
        self.uses += 1
        if self.uses < self.number:
            return None
        self.before = self.before or snapshot(self.model)
        return output * self.value


def test_nan_stops_before_the_update_and_saves_the_batch(tmp_path):
    trainer, model = make(tmp_path, **SETTINGS)
    poison = Poison(model, 6)  # the second micro-batch of the third update
    with pytest.raises(TrainingDivergedError) as error:
        trainer.train()
    assert moved(poison.before, model) == set()
    stem = tmp_path / "bad_batch-3"
    message = str(error.value)
    assert message.startswith("update 3 was not made: the loss is nan. Gradients are not finite in")
    assert f"{stem}.json and {stem}.safetensors" in message
    assert "lower learning_rate" in message
    record = json.loads((tmp_path / "bad_batch-3.json").read_text())
    assert record["step"] == 3
    assert record["grad_norm"] == "nan"
    assert "latent.policy.head.weight" in record["parameters_with_non_finite_gradients"]
    good, bad = record["micro_batches"]
    assert math.isfinite(good["loss"])
    assert bad["loss"] == "nan"
    row = bad["rows"][0]
    assert row["prompt"].startswith("user: ")
    assert set(row) == {"prompt", "completion", "codes", "reward", "rewards", "advantage"}
    assert row["rewards"]["even_tokens"] == row["reward"]
    tensors = load_file(tmp_path / "bad_batch-3.safetensors")
    assert tensors["1.codes"].shape[0] == len(bad["rows"]) == 8
    for index, row in enumerate(bad["rows"]):
        codes = tensors["1.codes"][index]
        assert codes[codes >= 0].tolist() == row["codes"]
        assert tensors["1.advantages"][index].item() == pytest.approx(row["advantage"])


def test_a_stopped_run_resumes_from_its_last_checkpoint(tmp_path):
    whole, whole_model = make(tmp_path / "whole", **SETTINGS)
    whole.train()
    trainer, model = make(tmp_path / "stopped", **SETTINGS)
    poison = Poison(model, 6)
    with pytest.raises(TrainingDivergedError):
        trainer.train()
    poison.handle.remove()
    trainer.train(resume_from_checkpoint=True)
    assert moved(snapshot(whole_model), model) == set()


def test_a_batch_resumed_within_a_rollout_is_known_in_words(tmp_path):
    trainer, _ = make(tmp_path, callbacks=[StopAt(2)], **SETTINGS)
    trainer.train()
    resumed, model = make(tmp_path, **SETTINGS)
    Poison(model, 1)
    with pytest.raises(TrainingDivergedError):
        resumed.train(resume_from_checkpoint=True)
    record = json.loads((tmp_path / "bad_batch-3.json").read_text())
    assert record["micro_batches"][0]["rows"][0]["prompt"].startswith("user: How many birds ?")


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "not-clipped"])
def test_a_gradient_alone_names_its_parameters(tmp_path, max_grad_norm):
    trainer, model = make(tmp_path, max_grad_norm=max_grad_norm)
    before = snapshot(model)
    model.latent.policy.head.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingDivergedError, match=r"norm is nan though the loss is finite"):
        trainer.train()
    record = json.loads((tmp_path / "bad_batch-1.json").read_text())
    assert record["parameters_with_non_finite_gradients"] == ["latent.policy.head.weight"]
    assert moved(before, model) == set()


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"max_grad_norm_before_stop": 1e-6}, "above max_grad_norm_before_stop=1e-06"),
        ({"max_loss": 1e-9, "num_iterations": 2}, "above max_loss=1e-09"),
    ],
)
def test_an_explosion_stops_at_the_limit(tmp_path, limit, said):
    trainer, _ = make(tmp_path, **limit)
    with pytest.raises(TrainingDivergedError, match=said):
        trainer.train()
    assert list(tmp_path.glob("bad_batch-*.json"))


def test_a_watched_run_is_the_run_without(tmp_path):
    models = []
    for watched in (True, False):
        limits = {"max_loss": 1e6, "max_grad_norm_before_stop": 1e6} if watched else {}
        trainer, model = make(tmp_path, stop_on_nan=watched, max_grad_norm=0.05, **limits)
        trainer.train()
        models.append(model)
    assert moved(snapshot(models[0]), models[1]) == set()
    assert list(tmp_path.glob("bad_batch*")) == []


def test_a_run_may_ask_to_go_on(tmp_path):
    trainer, model = make(tmp_path, stop_on_nan=False, max_steps=1)
    Poison(model, 1)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.args.logging_nan_inf_filter


def test_skipped_steps_of_a_gradient_scaler_are_no_failure(tmp_path):
    trainer, model = make(tmp_path, max_steps=6, num_iterations=2)
    weights = [snapshot(model)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.scaler = scaler
    overflows = iter([math.inf, math.nan])  # the first two updates
    model.latent.policy.head.weight.register_hook(lambda gradient: gradient * next(overflows, 1))
    trainer.add_callback(Each(lambda: weights.append(snapshot(model))))
    trainer.train()
    assert scaler.get_scale() == 256.0
    assert [bool(moved(before, model)) for before in weights] == [True] * 6 + [False]
    assert not moved_between(weights[0], weights[2])
    assert moved_between(weights[2], weights[3])


class Each(TrainerCallback):
    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, **kwargs):
        self.do()


def moved_between(first, second):
    return any(not torch.equal(value, second[name]) for name, value in first.items())


def test_a_gradient_that_no_scale_makes_finite_stops_at_last(tmp_path):
    trainer, model = make(tmp_path, max_steps=MAX_SKIPPED + 5, num_iterations=30)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    model.latent.policy.head.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        TrainingDivergedError, match=f"not finite in {MAX_SKIPPED} updates in a row"
    ):
        trainer.train()
    assert trainer.state.global_step == MAX_SKIPPED - 1


def test_a_stage_stops_too(tmp_path):
    world = tiny_world()
    trainer = StageTrainer(
        world.model,
        InverseWarmup(1e-3),
        arguments(tmp_path, max_steps=6),
        world.rows,
        processing_class=world.processor,
    )
    before = {}
    trainer.add_callback(Each(lambda: before.update(snapshot(world.model))))
    inverse = world.model.latent.inverse

    def poison(module, inputs, output):
        if trainer.state.global_step == 2:
            return output * math.nan
        return None

    inverse.head.register_forward_hook(poison)
    with pytest.raises(TrainingDivergedError, match="update 3 was not made"):
        trainer.train()
    # The codebook's running averages neither, which the forward pass moves.
    assert moved(before, world.model) == set()
    record = json.loads((tmp_path / "bad_batch-3.json").read_text())
    assert "How many birds" in record["micro_batches"][0]["texts"][0]
    tensors = load_file(tmp_path / "bad_batch-3.safetensors")
    assert {"0.labels", "0.inputs.input_ids", "0.inputs.pixel_values"} <= set(tensors)


def test_a_batch_that_cannot_be_saved_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("latent_rl.train.divergence.write_tensors", full)
    trainer, model = make(tmp_path, max_steps=1)
    Poison(model, 1)
    with pytest.raises(TrainingDivergedError, match=r"could not be saved .*No space left"):
        trainer.train()


def test_every_process_comes_to_the_same_verdict():
    other = torch.tensor([math.nan, 1.0])
    watch = UpdateWatch(Limits(), lambda mine: torch.cat([mine, other]))
    watch.add("batch", torch.tensor(0.5))
    bad = watch.judge(torch.tensor(1.0), scaled=False)
    assert bad.reason == "the loss is nan"
    assert bad.losses == [0.5]
    assert bad.batches == ["batch"]
    watch.add("next", torch.tensor(-7.0))
    watch.limits = Limits(stop_on_nan=False, max_loss=6.0)
    watch.gather = lambda mine: mine
    assert "size 7, above max_loss=6" in watch.judge(torch.tensor(1.0), scaled=False).reason


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match="max_loss must be a positive number or None, got -1"):
        config(tmp_path, max_loss=-1)
    with pytest.raises(ValueError, match="max_grad_norm_before_stop must be a positive"):
        arguments(tmp_path, max_grad_norm_before_stop=math.inf)
    with pytest.raises(ImportError, match=r"report_to='mlflow' needs .* pip install mlflow"):
        BaseArguments(output_dir=str(tmp_path), report_to="mlflow", use_cpu=True)
