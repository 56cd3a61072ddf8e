"""Stateful parts: what checkpoints carry for a trainer, and resuming in the middle of a rollout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from latent_rl.train.checkpointing import latest_checkpoint
from latent_rl.train.metric_averages import MetricAverages
from latent_rl.train.stateful import StatefulParts
from tests.train.test_rl_trainer import make
from tests.train.test_stage_trainer import StopAt
from tests.train.tiny_world import moved, snapshot


class Controller:
    """A part with every kind of value."""

    def __init__(self, beta: float = 0.1) -> None:
        self.state = {
            "beta": beta,
            "steps": 3,
            "name": "adaptive",
            "frozen": False,
            "target": None,
            "history": [0.1, math.inf, [1, 2]],
            "nested": {"momentum": torch.tensor([1.5, math.nan]), "empty": torch.empty(0)},
        }

    def state_dict(self):
        return self.state

    def load_state_dict(self, state_dict):
        self.state = state_dict


def test_a_part_gets_back_exactly_what_it_gave(tmp_path):
    first, tied = StatefulParts(), nn.Linear(3, 3)
    tied.twin = tied.weight  # two names of one memory
    first.add("controller", Controller())
    first.add("tied", tied)
    first.save(tmp_path, rank=0, world_size=1)
    second, other, module = StatefulParts(), Controller(0.7), nn.Linear(3, 3)
    module.twin = module.weight
    second.add("controller", other)
    second.add("tied", module)
    second.load(tmp_path, rank=0, world_size=1)
    expected = Controller().state
    momentum = other.state["nested"].pop("momentum")
    torch.testing.assert_close(
        momentum, expected["nested"].pop("momentum"), rtol=0, atol=0, equal_nan=True
    )
    assert other.state["nested"].pop("empty").shape == (0,)
    expected["nested"].pop("empty")
    assert other.state == expected
    assert moved(snapshot(tied), module) == set()


def test_each_process_keeps_its_own(tmp_path):
    for rank in (0, 1):
        parts = StatefulParts()
        parts.add("shared", Controller(0.5 + rank))
        parts.add("own", Controller(rank), per_rank=True)
        parts.save(tmp_path, rank=rank, world_size=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"state-{n}.safetensors" for n in ("own.rank0", "own.rank1", "shared")]
    parts, shared, own = StatefulParts(), Controller(), Controller()
    parts.add("shared", shared)
    parts.add("own", own, per_rank=True)
    parts.load(tmp_path, rank=1, world_size=2)
    assert (shared.state["beta"], own.state["beta"]) == (0.5, 1)
    with pytest.raises(ValueError, match="written by 2 processes, this run has 1"):
        parts.load(tmp_path, rank=0, world_size=1)


def test_parts_are_checked(tmp_path):
    parts = StatefulParts()
    parts.add("controller", Controller())
    with pytest.raises(ValueError, match="'controller' is taken"):
        parts.add("controller", Controller())
    with pytest.raises(ValueError, match="name must match"):
        parts.add("../elsewhere", Controller())
    with pytest.raises(TypeError, match=r"must have state_dict and load_state_dict, got float"):
        parts.add("beta", 0.1)
    with pytest.raises(ValueError, match=r"holds no state-controller\.safetensors"):
        parts.load(tmp_path, rank=0, world_size=1)
    wrong = StatefulParts()
    wrong.add("wrong", Controller())
    wrong._parts["wrong"][0].state = {"fine": 1, "deep": [{"generator": object()}]}
    with pytest.raises(TypeError, match=r"/deep/0/generator must be a tensor.*got object"):
        wrong.save(tmp_path, rank=0, world_size=1)
    wrong._parts["wrong"][0].state = {0: 1}
    with pytest.raises(TypeError, match="keys must be str, got 0"):
        wrong.save(tmp_path, rank=0, world_size=1)
    assert list(tmp_path.iterdir()) == []
    parts.save(tmp_path, rank=0, world_size=1)
    file = tmp_path / "state-controller.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"cannot read checkpoint file .*state-controller"):
        parts.load(tmp_path, rank=0, world_size=1)


def test_averages_continue():
    first, second = MetricAverages(), MetricAverages()
    first.add({"reward": torch.tensor(0.1), "rewards/judge/mean": 2.0})
    first.add({"reward": math.nan})
    second.load_state_dict(first.state_dict())
    for averages in (first, second):
        averages.add({"reward": torch.tensor(0.3)})
    assert first.flush("eval_") == second.flush("eval_")


# 2 micro-batches per update and 6 per rollout: updates 1 and 2 of 3 fall within a rollout.
MIDDLE = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
    "num_iterations": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 2,
    "top_k": 6,
    "learning_rate": 3e-2,
}


def numbers(trainer):
    """Everything logged except what is measured."""
    skip = ("seconds", "runtime", "per_second", "memory_bytes")
    return [
        {name: value for name, value in entry.items() if not name.endswith(skip)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resuming_within_a_rollout_is_exact(tmp_path, stop):
    whole, whole_model = make(tmp_path / "whole", **MIDDLE)
    whole.train()
    cut, _ = make(tmp_path / "cut", callbacks=[StopAt(stop)], **MIDDLE)
    cut.train()
    resumed, model = make(tmp_path / "cut", **MIDDLE)
    with torch.no_grad():  # another start: the reference must come from the checkpoint
        resumed.reference.head.weight.add_(1.0)
    torch.manual_seed(99)
    rollouts, make_replay = [], resumed._new_replay
    resumed._new_replay = lambda numbers, number: (
        rollouts.append(number) or make_replay(numbers, number)
    )
    resumed.train(resume_from_checkpoint=True)
    assert rollouts == [1] * (stop <= 3)  # the interrupted rollout is not made again
    assert moved(snapshot(whole_model), model) == set()
    assert numbers(resumed) == numbers(whole)


def test_the_replay_is_kept_within_a_rollout_alone(tmp_path):
    trainer, _ = make(tmp_path, **MIDDLE)
    trainer.train()
    sizes = [
        (tmp_path / f"checkpoint-{step}" / "state-rollout.rank0.safetensors").stat().st_size
        for step in range(1, 7)
    ]
    states = sum(group.num_bytes for group in trainer._replay.states.groups)
    for step, size in enumerate(sizes, 1):
        if step % 3:
            assert size > states
        else:
            assert size < 2000


def test_another_cut_of_the_rollout_is_refused(tmp_path):
    trainer, _ = make(tmp_path, callbacks=[StopAt(1)], **MIDDLE)
    trainer.train()
    other, _ = make(tmp_path, **{**MIDDLE, "num_iterations": 2})
    with pytest.raises(ValueError, match=r"num_iterations was 6 .* it is 4 now"):
        other.train(resume_from_checkpoint=True)
    without, _ = make(tmp_path, **MIDDLE, beta=0.0)
    without.train(resume_from_checkpoint=str(latest_checkpoint(tmp_path)))
    with_reference, _ = make(tmp_path, **MIDDLE)
    with pytest.raises(ValueError, match=r"checkpoint-6 holds no state-reference"):
        with_reference.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("spill", "layout"), [("host", "packed"), ("recompute", "padded")])
def test_resuming_is_exact_however_the_replay_is_kept(tmp_path, spill, layout):
    kept = {"replay_memory_gb": 5e-5, "replay_spill": spill, "replay_layout": layout}
    settings = {**MIDDLE, **kept, "max_steps": 3, "save_steps": 2}
    whole, whole_model = make(tmp_path / "whole", **settings)
    whole.train()
    cut, _ = make(tmp_path / "cut", callbacks=[StopAt(2)], **settings)
    cut.train()
    resumed, model = make(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert moved(snapshot(whole_model), model) == set()
