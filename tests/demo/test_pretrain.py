"""Pre-training of the demo's base model starts over when interrupted, and ends the same."""

from __future__ import annotations

import pytest
import torch

from latent_rl.data import ConversationCollator
from latent_rl.demo.pretrain import Phase, pretrain
from latent_rl.demo.tiny_vlm import TinyVlmSizes, build_model, build_processor
from tests.train.tiny_world import moved, snapshot


class InterruptedRunError(Exception):
    """What ends a run in the middle."""


def test_an_interrupted_pre_training_repeated_gives_the_same_weights():
    texts = ["one bird", "two birds sing", "three birds sing in a tree"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "How many ?"},
                {"role": "assistant", "content": text},
            ],
            "images": [],
        }
        for text in texts
    ]
    sizes = TinyVlmSizes()
    processor = build_processor([*texts, "How many ?"], sizes)
    encoded = {"texts": ConversationCollator(processor).encode(rows)}
    phases = [Phase({"texts": 1.0}, 3, 3e-3, batch_size=2), Phase({"texts": 1.0}, 2, 1e-3, 2)]

    def trained(stop_at: int | None = None):
        torch.manual_seed(0)
        model = build_model(processor, sizes)

        def on_step(step: int, loss: float) -> None:
            if step == stop_at:
                raise InterruptedRunError

        return model, pretrain(model, processor, encoded, phases, 0, on_step)

    whole, losses = trained()
    with pytest.raises(InterruptedRunError):
        trained(stop_at=3)
    torch.randn(7)  # another process would be at another point of its random numbers
    again, repeated = trained()
    assert repeated == losses
    assert moved(snapshot(whole), again) == set()
