"""A tiny latent-action model and its data, shared by the tests of the trainers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from latent_rl.data import PairedViewCollator
from latent_rl.models import LatentActionModel, LatentConfig
from tests.tiny_models import tiny_image, tiny_vlm

ANSWERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
KEYS = {"num_codes": 8, "inverse_layers": 1, "policy_layers": 1, "merge_blocks": 2}


class TinyWorld(NamedTuple):
    """model: K = 8; rows: conversations, every fourth without its image."""

    model: LatentActionModel
    processor: Any
    rows: list[dict[str, Any]]
    collator: PairedViewCollator


def tiny_model(seed: int = 0, *, act: float = 0.0, **config: Any) -> tuple[LatentActionModel, Any]:
    """Return (model, processor), the same for the same arguments.

    act: standard deviation of the merge's last projections; above 0 codes matter without training.
    """
    vlm = tiny_vlm("qwen2_5_vl")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatentActionModel(vlm.model, LatentConfig(**{**KEYS, **config}))
        if act:
            for block in model.latent.merge.blocks:
                nn.init.normal_(block.w_down, std=act)
    return model, vlm.processor


def conversation(index: int, *, image: bool) -> dict[str, Any]:
    parts = [{"type": "text", "text": "How many birds are there ?"}]
    if image:
        parts = [{"type": "image"}, *parts]
    answer = f"{ANSWERS[index % 8]} birds ." if index % 2 else ANSWERS[index % 8]
    return {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": [tiny_image(index)] if image else [],
    }


def tiny_world(seed: int = 0, *, rows: int = 16, **config: Any) -> TinyWorld:
    """Return a model with paired and text-only conversations."""
    model, processor = tiny_model(seed, **config)
    data = [conversation(index, image=index % 4 != 3) for index in range(rows)]
    return TinyWorld(model, processor, data, PairedViewCollator(processor))


def prompts(count: int = 8, *, image: bool = True) -> list[dict[str, Any]]:
    """RL rows with images on every other one."""
    return [
        {
            "prompt": [{"role": "user", "content": "How many birds ?" + " one" * (index % 3)}],
            "images": [tiny_image(index)] if image and index % 2 else [],
            "answer": index,
        }
        for index in range(count)
    ]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    """Names whose values changed since `snapshot`."""
    now = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, now[name])}
