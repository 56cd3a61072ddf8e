"""The decoding loop of the paper's code, rebuilt from its description, as a peer.

Per token: one forward of the model, the policy over its own cache, the best 32 codes and a draw
from their softmax, the code as a one-hot row times the codebook, the merge as products over the
concatenation, and a look at every row from the host.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from latent_rl.models import LatentActionModel
from latent_rl.models.backbone import suppressed_token_ids

TOP_K = 32


class PaperLoop:
    """``loop(inputs, steps)`` -> completions, as the paper's code makes them."""

    def __init__(self, model: LatentActionModel) -> None:
        self._model = model
        self._banned = suppressed_token_ids(model.config)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], steps: int, ends: list[int]) -> Tensor:
        model, backbone = self._model, self._model.backbone
        rows = len(inputs["input_ids"])
        trunk, policy = DynamicCache(), DynamicCache()
        mask = inputs["attention_mask"]
        finished = [False] * rows
        said: list[Tensor] = []
        given: dict[str, Tensor] = dict(inputs)
        if "image_grid_thw" not in inputs:
            # Of text alone the model would count positions from what an earlier prompt left it.
            given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        for _ in range(steps):
            states: list[Tensor] = []
            positions: list[Tensor] = []

            def keep(module, args, kwargs, out, states=states, positions=positions) -> None:
                states.append(out.last_hidden_state)
                positions.append(kwargs["position_ids"])

            handle = model.decoder.register_forward_hook(keep, with_kwargs=True)
            backbone(**given, past_key_values=trunk, use_cache=True)
            handle.remove()
            hidden = states[0]
            out = model.latent.policy.tower(
                inputs_embeds=hidden,
                attention_mask=mask,
                position_ids=positions[0],
                past_key_values=policy,
                use_cache=True,
            )
            logits = model.latent.policy.head(out.last_hidden_state[:, -1])
            merged = self._merge(hidden[:, -1], self._draw(logits))
            scores = model.lm_logits(merged)
            scores[:, self._banned] = -torch.inf
            tokens = scores.argmax(-1)
            for row in range(rows):
                finished[row] = finished[row] or tokens[row].item() in ends
            said.append(tokens)
            if all(finished):
                break
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            given = {
                "input_ids": tokens[:, None],
                "attention_mask": mask,
                "position_ids": positions[0][..., -1:] + 1,
            }
        return torch.stack(said, 1)

    def _draw(self, logits: Tensor) -> Tensor:
        """One-hot rows [B, K]: a draw from the softmax over the best codes."""
        values, order = logits.topk(min(TOP_K, logits.shape[-1]), -1)
        codes = order.gather(-1, torch.multinomial(values.softmax(-1), 1))[:, 0]
        return torch.nn.functional.one_hot(codes, logits.shape[-1]).to(logits.dtype)

    def _merge(self, state: Tensor, one_hot: Tensor) -> Tensor:
        latent = self._model.latent
        vector = one_hot @ latent.quantizer.codebook.weight.to(state.dtype)
        x = state
        for block in latent.merge.blocks:
            both = torch.cat([x, vector], -1)
            gate = torch.nn.functional.silu(both @ block.w_gate.T)
            x = x + (gate * (both @ block.w_up.T)) @ block.w_down.T
        return x
