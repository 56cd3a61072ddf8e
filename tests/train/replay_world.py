"""Rollouts of tiny models as replays, shared by the tests of the replay."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from latent_rl.models import LatentActionModel, LatentConfig
from latent_rl.train.replay import LAYOUTS, Replay, ReplayStates, action_logits, group_states
from latent_rl.train.replay.stores import GroupRecipe
from tests.tiny_models import render, tiny_image, tiny_vlm

G = 3


@functools.cache
def rollout(architecture: str, images: bool = True, steps: int = 9):
    """(model, inputs of 2 prompts, generation of G completions each); lengths differ."""
    vlm = tiny_vlm(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Gemma3's last two layers would not let completions reach images: full, then a window.
        layers = 3 if architecture == "gemma3" else 2
        config = LatentConfig(num_codes=8, inverse_layers=1, policy_layers=layers, merge_blocks=1)
        model = LatentActionModel(vlm.model, config)
        for block in model.latent.merge.blocks:
            nn.init.normal_(block.w_down, std=0.3)
        nn.init.normal_(model.latent.policy.head.weight, std=0.3)
    texts = ["What is in the picture ? A red house . one two three", "How many birds ?"]
    pictures = [tiny_image(0) if images else None, tiny_image(1) if images else None]
    batch = render(vlm.processor, texts, pictures)
    repeated = render(
        vlm.processor, [t for t in texts for _ in range(G)], [p for p in pictures for _ in range(G)]
    )
    out = model.generate(repeated, max_new_tokens=steps, seed=3, return_hidden=True)
    return model, batch, out


def keep_mask(generation: Any) -> torch.Tensor:
    """Kept steps: completions cut to 9, 6, 3, ... tokens, a gap in one, one row without any."""
    lengths = torch.tensor([9, 4, 0, 6, 1, 7])
    keep = generation.completion_mask & (torch.arange(9) < lengths[:, None])
    keep[0, 2] = False
    return keep


def replay_of(
    architecture: str = "qwen2_5_vl", layout: str = "packed", store: str = "device", **changes: Any
) -> Replay:
    """The rollout as a replay, its groups in one of the stores."""
    model, batch, generation = rollout(architecture)
    lengths = generation.completion_mask.sum(1).tolist()
    groups: list[Any] = group_states(model, generation.trace, lengths, group_size=G, dtype=None)
    if store == "host":
        groups = [group.spill() for group in groups]
    elif store == "recompute":
        from latent_rl.decode.prompts import split_prompts

        tokens = [ids[:n] for ids, n in zip(generation.completion_ids, lengths, strict=True)]
        groups = [
            GroupRecipe(prompt, tuple(tokens[at * G : (at + 1) * G]))
            for at, prompt in enumerate(split_prompts(model.config, batch))
        ]
    rows = len(lengths)
    fields = {
        "codes": generation.codes,
        "keep_mask": keep_mask(generation),
        "advantages": torch.linspace(-1, 1, rows),
        "seeds": torch.arange(rows),
        "states": ReplayStates.of(groups, model),
        "layout": LAYOUTS[layout],
    }
    return Replay(**{**fields, **changes})


def loss_and_gradients(architecture: str, logits_of: Any) -> tuple[torch.Tensor, list[Any]]:
    """A loss that weighs every kept step and code differently, and the policy's gradients."""
    model, _, generation = rollout(architecture)
    policy = model.latent.policy
    logits = logits_of(policy)
    keep = keep_mask(generation)[:, : logits.shape[1]]
    # A micro-batch is cut to its last kept step.
    weights = torch.randn(len(logits), 9, 8, generator=torch.Generator().manual_seed(1))
    weights = weights[:, : logits.shape[1]]
    loss = (logits.log_softmax(-1) * weights)[keep].sum()
    gradients = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    return loss.detach(), [g for g in gradients if g is not None]


def of_replay(replay: Replay, rows: list[int] | None = None):
    """`logits_of` for the rows of a replay."""
    return lambda policy: action_logits(policy, replay.batch(rows or range(len(replay))))


def of_trace(architecture: str):
    """`logits_of` by one plain pass over the padded trace: the truth."""
    model, _, generation = rollout(architecture)
    state = model.state(generation.trace).detach()
    first = generation.prompt_length - 1

    def logits(policy: Any) -> torch.Tensor:
        whole = policy(state, generation.trace.tower_kwargs)
        return whole[:, first : first + generation.codes.shape[1]]

    return logits
