"""Latent models over tiny backbones, loud enough that codes change what is said."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from latent_rl.models import LatentActionModel, LatentConfig
from tests.tiny_models import ARCHITECTURES, prompts, tiny_vlm

NUM_CODES = 16


class Case(NamedTuple):
    """A latent model, its processor and two image prompts of different lengths."""

    model: LatentActionModel
    processor: Any
    inputs: dict[str, Tensor]


def build(name: str, **config: Any) -> Case:
    """A latent model whose untrained parts are widened: its codes matter, its policy chooses."""
    backbone, processor = tiny_vlm(name)
    sizes = {"num_codes": NUM_CODES, "inverse_layers": 1, "policy_layers": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LatentActionModel(backbone, LatentConfig(**{**sizes, **config}))
        for block in model.latent.merge.blocks:
            torch.nn.init.normal_(block.w_down, std=0.3)
        torch.nn.init.normal_(model.latent.policy.head.weight, std=0.3)
        if model.latent.projector is not None:
            last = model.latent.projector.to_image_text.mean_net[-1]
            torch.nn.init.normal_(last.weight, std=0.3)
    return Case(model, processor, prompts(processor))


@pytest.fixture(params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> Case:
    """One architecture after another."""
    return build(request.param)


@pytest.fixture
def qwen() -> Case:
    """Qwen2.5-VL alone, for what does not depend on the architecture."""
    return build("qwen2_5_vl")
