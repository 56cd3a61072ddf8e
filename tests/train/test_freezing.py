"""Freezing by module identity, and the modes that go with it."""

from __future__ import annotations

import pytest
from torch import nn

from latent_rl.train.freezing import freeze, set_training_modes


def network() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"a": nn.Linear(2, 3), "b": nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))}
    )


def test_exactly_the_given_modules_train():
    model = network()
    report = freeze(model, [model["b"]])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"b.0.weight", "b.0.bias"}
    assert report == (12, 21)
    freeze(model, [model["a"].weight])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"a.weight"}


def test_a_namesake_of_another_model_is_refused():
    model, other = network(), network()
    with pytest.raises(ValueError, match="Linear is not part of the model"):
        freeze(model, [other["a"]])
    with pytest.raises(ValueError, match=r"parameter of shape \(3, 2\)"):
        freeze(model, [other["a"].weight])
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(model, [model["b"][1]])


def test_only_trainable_modules_are_in_train_mode():
    model = network().train()
    set_training_modes(model, [model["a"]])
    assert model["a"].training
    assert not model["b"][1].training


def test_a_module_left_in_train_mode_is_found_inside_one_in_eval_mode():
    model = network().eval()
    model["b"][1].train()
    set_training_modes(model, [])
    assert not any(module.training for module in model.modules())
