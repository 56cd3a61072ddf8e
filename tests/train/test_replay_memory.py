"""A trainer under a memory budget, in other layouts and precisions, makes the same updates."""

from __future__ import annotations

import logging

import pytest
import torch

from latent_rl.train.replay import ReplayMemory
from latent_rl.train.replay.memory import SPILLS, Call, Shapes
from latent_rl.train.rl_config import LatentGRPOConfig
from tests.train.replay_world import replay_of
from tests.train.test_rl_trainer import logged, make

SHAPES = Shapes(groups=5, group_size=4, prompt_tokens=30, new_tokens=11, hidden=64, itemsize=4)
# Plain gradient descent: Adam would turn rounding of a zero gradient into a whole step.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "per_device_train_batch_size": 32}


def trained(path, **changes) -> tuple[dict[str, torch.Tensor], object]:
    """The policy's weights after two updates."""
    trainer, model = make(path, **{**SGD, **changes})
    trainer.train()
    return {n: p.detach() for n, p in model.latent.policy.named_parameters()}, trainer


def assert_same(ours, theirs):
    # Updates of .1 to 1e-3; rounding of float32 sums in another order.
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=2e-6, msg=name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    weights, trainer = trained(tmp_path_factory.mktemp("plain"))
    assert logged(trainer, "replay/spilled_rows")[-1] == 0
    return weights


def test_a_forecast_counts_what_a_call_holds():
    assert SHAPES.group_bytes == 4 * (30 + 10) * 64 * 4
    assert SHAPES.kept_bytes == 5 * (30 + 4 * 10) * 64 * 4
    unlimited = ReplayMemory()
    assert unlimited.calls(SHAPES, held=10**12) == [Call(0, 5)]


@pytest.mark.parametrize(
    ("spill", "calls"),
    [
        ("host", [Call(0, 2), Call(2, 4), Call(4, 5)]),
        ("recompute", [Call(0, 2), Call(2, 5, states=False)]),
    ],
)
def test_a_rollout_is_cut_into_calls_that_fit(spill, calls):
    memory = ReplayMemory(int(2.5 * SHAPES.group_bytes), SPILLS[spill])
    assert memory.calls(SHAPES, held=0) == calls
    assert memory.calls(SHAPES, held=2 * SHAPES.group_bytes)[0] == Call(0, 1)
    with pytest.raises(ValueError, match=r"one group needs 3.81e-05 GiB \(4 completions x \(30 "):
        ReplayMemory(1000, SPILLS[spill]).calls(SHAPES, held=0)


def test_groups_beyond_the_budget_are_put_away():
    groups = list(replay_of().states.groups)
    memory = ReplayMemory(groups[0].num_bytes + 1)
    assert [group.spilled for group in memory.place(groups, held=0)] == [False, True]
    assert [group.spilled for group in memory.place(groups, held=2)] == [
        True,
        groups[1].num_bytes >= groups[0].num_bytes,
    ]


@pytest.mark.parametrize("spill", ["host", "recompute"])
def test_a_trainer_with_little_memory_ends_with_the_same_weights(tmp_path, plain, caplog, spill):
    # A call may hold one group of 4 x (about 40 + 5) positions, 64 wide, in float32; kept without
    # padding, its prompt once, each takes a quarter of that, and there are eight.
    with caplog.at_level(logging.INFO, "latent_rl"):
        weights, trainer = trained(tmp_path, replay_memory_gb=6e-5, replay_spill=spill)
    spilled = logged(trainer, "replay/spilled_rows")
    assert all(0 < rows < 32 for rows in spilled)
    assert all(0 < size <= 6e-5 for size in logged(trainer, "replay/device_gb"))
    assert_same(weights, plain)
    where = {"host": "to host memory", "recompute": "will be recomputed"}[spill]
    assert any(where in r.getMessage() and "forecast" in r.getMessage() for r in caplog.records)


def test_a_budget_that_holds_no_group_says_what_to_lower(tmp_path):
    trainer, _ = make(tmp_path, replay_memory_gb=1e-6)
    with pytest.raises(ValueError, match=r"lower num_generations, max_completion_length or"):
        trainer.train()


def test_the_padded_layout_ends_with_the_same_weights(tmp_path, plain):
    weights, _ = trained(tmp_path, replay_layout="padded")
    assert_same(weights, plain)


def test_gradient_checkpointing_ends_with_the_same_weights(tmp_path, plain):
    weights, _ = trained(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert_same(weights, plain)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_accumulating_smaller_micro_batches_changes_nothing(tmp_path, loss_type):
    changes = {"loss_type": loss_type, "dynamic_sampling": False, "max_steps": 1}
    whole, _ = trained(tmp_path / "1x32", **changes)
    parts, trainer = trained(
        tmp_path / "4x8",
        **changes,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
    )
    assert trainer.state.global_step == 1
    assert_same(parts, whole)


def test_bf16_training_stays_near_float32(tmp_path, plain):
    weights, trainer = trained(tmp_path, bf16=True)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    start, _ = trained(tmp_path / "start", learning_rate=0.0)
    moved = torch.cat([(plain[n] - start[n]).flatten() for n in start])
    ours = torch.cat([(weights[n] - start[n]).flatten() for n in start])
    # Codes near a boundary may fall otherwise in bfloat16, so directions agree, not values.
    assert torch.cosine_similarity(ours, moved, dim=0) > 0.5
    assert not torch.equal(ours, moved)
    assert logged(trainer, "loss")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay_spill": "disk"}, "replay_spill must be one of host, recompute, got 'disk'"),
        ({"replay_layout": "ragged"}, "replay_layout must be one of packed, padded"),
        ({"replay_memory_gb": 0.0}, "replay_memory_gb must be > 0 or None, got 0.0"),
        ({"replay_dtype": "int8"}, "replay_dtype must name a floating dtype"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        LatentGRPOConfig(output_dir=str(tmp_path), **changes)
