"""One decoding step for n rows: trunk, policy, code, merge, head, token. Nothing leaves the device.

Every tensor the step reads or writes is allocated before it and stays where it is, so on CUDA the
whole step is one graph, and new weights, prompts and seeds need no new graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from latent_rl import ops
from latent_rl.decode.attention import visible_runs
from latent_rl.decode.output import Said
from latent_rl.decode.settings import DecodeSettings
from latent_rl.decode.slot_cache import SlotStore, SlotWindow
from latent_rl.models import LatentActionModel
from latent_rl.models.generation import TOKEN_STREAM

__all__ = ["Rows", "Step"]

# An end token by itself costs two launches; isin takes five and more, however many there are.
_FEW_ENDS = 2


@dataclass
class Rows:
    """What every slot knows about its request, the slot on the last axis, on the device.

    Attributes:
        tokens: the token to read next.
        lengths: positions cached so far, the prompt's among them.
        shared: of those, the prompt's, which completions of it share.
        shared_at: where in the storage the prompt begins.
        positions: [P, slots], the rotary position of the next token (P of them per token).
        steps: tokens said so far.
        limits: tokens to say at most.
        seeds: of the random stream.
        forced: the code to take at this step, or -1.
        allowed: bool [K, slots], the codes to choose from.
        text_only: no image in the prompt.
        active: still speaking.
    """

    tokens: Tensor
    lengths: Tensor
    shared: Tensor
    shared_at: Tensor
    positions: Tensor
    steps: Tensor
    limits: Tensor
    seeds: Tensor
    forced: Tensor
    allowed: Tensor
    text_only: Tensor
    active: Tensor

    @classmethod
    def empty(cls, slots: int, positions: int, num_codes: int, device: torch.device) -> Rows:
        """Idle slots, with ``positions`` rotary positions per token."""

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def flags(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.bool, device=device)

        return cls(
            tokens=integers(slots),
            lengths=integers(slots),
            shared=integers(slots),
            shared_at=integers(slots),
            positions=integers(positions, slots),
            steps=integers(slots),
            limits=integers(slots),
            seeds=integers(slots),
            forced=integers(slots) - 1,
            allowed=~flags(num_codes, slots),
            text_only=flags(slots),
            active=flags(slots),
        )

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return list(vars(self).values())

    def move(self, source: int, target: int) -> None:
        """Copy a slot's values to another."""
        for tensor in self.tensors():
            tensor[..., target] = tensor[..., source]


class Step:
    """The model's step over slots, and the first action after a prompt."""

    def __init__(
        self,
        model: LatentActionModel,
        rows: Rows,
        said: Said,
        stores: tuple[SlotStore, SlotStore],
        window: SlotWindow,
        tables: list[Tensor],
        settings: DecodeSettings,
        *,
        forced: bool,
        allowed: bool,
    ) -> None:
        """``stores`` are the trunk's and the policy's; ``window`` is theirs too; ``tables`` are
        the merge's.

        ``forced`` and ``allowed`` say whether the rows' fields of that name are looked at.
        """
        self._model, self._rows, self._said, self._window = model, rows, said, window
        self._trunk, self._policy = stores
        self._tables = tables
        self._settings, self._forced, self._allowed = settings, forced, allowed
        device = rows.tokens.device
        self._eos = torch.tensor(settings.eos_token_ids, dtype=torch.int64, device=device)
        self._idle = torch.tensor(-1, dtype=torch.int64, device=device)
        self._banned = torch.tensor(settings.suppress_tokens, dtype=torch.int64, device=device)
        self._embed = cast(Any, model.backbone).get_input_embeddings()
        layout = self._trunk.layout
        self._own_at = layout.slot_at(0) + layout.slot_length * torch.arange(
            layout.slots, device=device
        )

    def snapshot(self) -> list[Tensor]:
        """Copies of what a step changes, besides keys at positions not yet counted."""
        return [tensor.clone() for tensor in self._rows.tensors()]

    def restore(self, saved: list[Tensor]) -> None:
        """Undo steps since :meth:`snapshot`."""
        for tensor, value in zip(self._rows.tensors(), saved, strict=True):
            tensor.copy_(value)

    def __call__(self, n: int, bound: int) -> None:
        """Advance the first ``n`` slots by one token; ``bound`` exceeds every cached length."""
        rows, model, window = self._rows, self._model, self._window
        lengths, active = rows.lengths[:n], rows.active[:n]
        window.bound = bound
        window.index = self._own_at[:n] + lengths - rows.shared[:n]
        kwargs = self._tower_kwargs(n, bound)
        out = model.decoder(
            inputs_embeds=self._embed(rows.tokens[:n, None]),
            past_key_values=self._trunk.cache,
            use_cache=True,
            **kwargs,
        )
        hidden = out.last_hidden_state
        self._said.hidden[:n] = hidden[:, 0]
        state, logits = hidden, None
        if model.is_active:
            state = model.project(hidden, rows.text_only[:n])
            logits = model.latent.policy(
                state, kwargs, past_key_values=self._policy.cache, last_only=True
            )[:, 0]
        # An idle slot rewrites its own next position for ever; nobody reads it.
        lengths += active
        rows.positions[:, :n] += active
        self.act(slice(0, n), state[:, 0], logits, hidden.dtype)

    def _tower_kwargs(self, n: int, bound: int) -> dict[str, Any]:
        rows, config = self._rows, self._model.decoder.config
        places = torch.stack((rows.shared_at[:n], rows.shared[:n], self._own_at[:n]), 1)
        # With the new position itself.
        ends = rows.lengths[:n] + 1
        mask: Any = visible_runs(places, ends, bound)
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            sliding = visible_runs(places, ends, bound, int(config.sliding_window))
            mask = {"full_attention": mask, "sliding_attention": sliding}
        positions = rows.positions[:, :n, None]
        return {
            "attention_mask": mask,
            "position_ids": positions[0] if positions.shape[0] == 1 else positions,
        }

    def act(
        self, at: slice, state: Tensor, policy_logits: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Choose codes and tokens for the slots ``at`` from states [n, H], and advance the slots.

        ``policy_logits`` float32 [n, K], or None for the base model; ``dtype`` is the trunk's.
        """
        rows, said = self._rows, self._said
        active, steps = rows.active[at], rows.steps[at]
        # Straight to their place: nearly half of the launches behind the towers were copies of [n].
        torch.where(active, steps, self._idle, out=said.columns[at])
        if policy_logits is not None:
            codes = self._choose(policy_logits, at)
            state = self._model.merge(state, codes, tables=self._tables).to(dtype)
        tokens = self._speak(self._model.lm_scores(state), at)
        said.ids[at, 0] = tokens
        spoken = rows.tokens[at]
        torch.where(active, tokens, spoken, out=spoken)
        steps += active
        active &= steps < rows.limits[at]
        if len(self._eos) <= _FEW_ENDS:
            for eos in self._eos:
                active &= tokens != eos
        else:
            active &= ~torch.isin(tokens, self._eos)

    def _choose(self, logits: Tensor, at: slice) -> Tensor:
        rows, settings, said = self._rows, self._settings, self._said
        if self._allowed:
            logits = logits.masked_fill(~rows.allowed[:, at].T, -torch.inf)
        codes, logprob, logprob_full, entropy = ops.sample_codes(
            logits,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            seed=rows.seeds[at],
            offset=rows.steps[at],
        )
        if self._forced:
            forced = rows.forced[at]
            scored = ops.code_logprobs(logits, forced.clamp_min(0))
            given = forced >= 0
            codes = torch.where(given, forced, codes)
            logprob = torch.where(given, scored.logprob, logprob)
            logprob_full = torch.where(given, scored.logprob, logprob_full)
            entropy = torch.where(given, scored.entropy, entropy)
        said.ids[at, 1] = codes
        torch.stack((logprob, logprob_full, entropy), 1, out=said.numbers[at])
        return codes

    def _speak(self, scores: Tensor, at: slice) -> Tensor:
        """The next token int64 [n] from scores [n, V] in the trunk's dtype, which it may overwrite.

        One pass over the scores: a vocabulary's are by far the largest thing a step writes.
        """
        rows, settings = self._rows, self._settings
        if settings.suppress_tokens:
            scores.index_fill_(1, self._banned, -torch.inf)
        if settings.min_new_tokens > 0 and settings.eos_token_ids:
            early = rows.steps[at] < settings.min_new_tokens
            ends = scores[:, self._eos].masked_fill(early[:, None], -torch.inf)
            scores.index_copy_(1, self._eos, ends)
        if not settings.do_sample_tokens:
            return scores.argmax(-1)
        return ops.sample_tokens(scores, seed=rows.seeds[at] ^ TOKEN_STREAM, offset=rows.steps[at])
