"""Completions of a rollout's prompts, in as many calls as the replay's memory asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from latent_rl.decode import Decoder
from latent_rl.decode.prompts import Prompt, split_prompts
from latent_rl.models import LatentGeneration
from latent_rl.train.replay.archive import KeptGroup
from latent_rl.train.replay.memory import Call, Shapes
from latent_rl.train.replay.states import group_states
from latent_rl.train.replay.stores import GroupRecipe

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel
    from latent_rl.train.rl_config import LatentGRPOConfig

__all__ = ["CompletionMaker", "Completions", "PromptRenderer", "Row"]

Row: TypeAlias = "Mapping[str, Any]"

PromptRenderer: TypeAlias = Callable[[Any, list[dict[str, Any]]], Mapping[str, Tensor]]
"""(processing_class, rows with `prompt` and `images`) -> left-padded model inputs."""


@dataclass(frozen=True)
class Completions:
    """B completions of at most T tokens.

    ids, codes, logprobs, mask  [B, T]
    groups                      what was kept of each group's states; empty if nothing
    forecast_bytes              of all states, before the rollout
    seconds                     of generation alone
    """

    ids: Tensor
    codes: Tensor
    logprobs: Tensor
    mask: Tensor
    groups: tuple[KeptGroup, ...]
    forecast_bytes: int
    seconds: float


class Generator(Protocol):
    """Makes the completions of some prompts."""

    def __call__(
        self, prompts: Sequence[Prompt], rows: list[Row], group: int, seeds: Tensor, hidden: bool
    ) -> LatentGeneration:
        """`rows` [R] are the prompts' rows, `group` of each in a row; seeds [R]."""
        ...


class CompletionMaker:
    """Renders prompts and completes them under the settings of a run."""

    def __init__(
        self, args: LatentGRPOConfig, processing_class: Any, renderer: PromptRenderer
    ) -> None:
        self.args = args
        self.processing_class = processing_class
        self.renderer = renderer
        self._decoder: Decoder | None = None

    def make(
        self, model: LatentActionModel, rows: list[Row], seeds: Tensor, *, keep: bool, held: int
    ) -> Completions:
        """Complete rows [B], each from its own seed.

        keep: whether states are kept for updates; held: bytes of states kept already.
        """
        args, memory = self.args, self.args.replay_memory()
        group = _group_size(rows, (args.num_generations, args.num_generations_eval))
        inputs = self._render(rows[::group], model.device)
        prompts: list[Prompt] = [{}] * len(inputs["input_ids"])
        if args.use_decoder or memory.budget_bytes is not None:
            # generate() takes inputs that cannot be taken apart as well.
            prompts = split_prompts(model.config, inputs)
        shapes = Shapes(
            groups=len(prompts),
            group_size=group,
            prompt_tokens=inputs["input_ids"].shape[1],
            new_tokens=args.max_completion_length,
            hidden=int(model.decoder.config.hidden_size),
            itemsize=max(model.dtype.itemsize, (memory.dtype or model.dtype).itemsize),
        )
        calls = memory.calls(shapes, held) if keep else [Call(0, len(prompts), states=False)]
        generate = self._decoding(model) if args.use_decoder else self._generating(model)
        parts: list[LatentGeneration] = []
        kept: list[KeptGroup] = []
        seconds = 0.0
        for call in calls:
            own = slice(call.begin * group, call.end * group)
            asked = prompts[call.begin : call.end]
            started = time.perf_counter()
            out = generate(asked, rows[own], group, seeds[own], call.states)
            seconds += time.perf_counter() - started
            if out.trace is not None and call.states:
                tokens = out.completion_mask.sum(1).tolist()
                states = group_states(
                    model, out.trace, tokens, group_size=group, dtype=memory.dtype
                )
                placed = memory.place(states, held)
                held += sum(s.num_bytes for s in placed if not s.spilled)
                kept += placed
            elif keep:
                kept += _recipes(asked, out, group)
            parts.append(out._replace(trace=None))
        return Completions(
            ids=_joined([part.completion_ids for part in parts], 0),
            codes=_joined([part.codes for part in parts], -1),
            logprobs=_joined([part.logprobs for part in parts], 0.0),
            mask=_joined([part.completion_mask for part in parts], False),
            groups=tuple(kept),
            forecast_bytes=shapes.kept_bytes,
            seconds=seconds,
        )

    def _decoding(self, model: LatentActionModel) -> Generator:
        """The decoding engine, which reads a group's prompt once."""
        args = self.args
        if self._decoder is None or self._decoder.model is not model:
            self._decoder = Decoder(
                model, tokenizer=self.processing_class, compile=args.decoder_compile
            )
        decoder = self._decoder

        def decode(
            prompts: Sequence[Prompt], rows: list[Row], group: int, seeds: Tensor, hidden: bool
        ) -> LatentGeneration:
            decoder.slots = args.decoder_slots or len(rows)
            out = decoder.generate(
                prompts,
                max_new_tokens=args.max_completion_length,
                num_generations=group,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                min_p=args.min_p or 0.0,
                seed=seeds,
                do_sample_tokens=args.do_sample_tokens,
                return_hidden=hidden,
                **(args.generation_kwargs or {}),
            )
            # It holds the padded states of the whole call.
            decoder.last_run = None
            return out.generation

        return decode

    def _generating(self, model: LatentActionModel) -> Generator:
        """The model's own generate."""
        args = self.args

        def generate(
            prompts: Sequence[Prompt], rows: list[Row], group: int, seeds: Tensor, hidden: bool
        ) -> LatentGeneration:
            return model.generate(
                self._render(rows, model.device),
                max_new_tokens=args.max_completion_length,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                min_p=args.min_p or 0.0,
                seed=seeds,
                do_sample_tokens=args.do_sample_tokens,
                return_hidden=hidden,
                generation_kwargs=args.backbone_options(),
            )

        return generate

    def _render(self, rows: list[Row], device: torch.device) -> dict[str, Tensor]:
        prepared = []
        for row in rows:
            prompt, images = row["prompt"], row.get("images")
            if images is None and row.get("image") is not None:
                images = [row["image"]]
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            prepared.append({**row, "prompt": prompt, "images": list(images or [])})
        inputs = self.renderer(self.processing_class, prepared)
        return {
            name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)
        }


def _group_size(rows: Sequence[Row], sizes: Sequence[int | None]) -> int:
    """The first size by which every run of so many rows is one and the same row; else 1."""
    for size in sizes:
        whole = size is not None and len(rows) % size == 0
        if size and whole and all(row is rows[i - i % size] for i, row in enumerate(rows)):
            return size
    return 1


def _recipes(
    prompts: Sequence[Prompt], generation: LatentGeneration, group: int
) -> list[GroupRecipe]:
    tokens = [
        ids[mask]
        for ids, mask in zip(generation.completion_ids, generation.completion_mask, strict=True)
    ]
    return [
        GroupRecipe(dict(prompt), tuple(tokens[at * group : (at + 1) * group]))
        for at, prompt in enumerate(prompts)
    ]


def _joined(parts: Sequence[Tensor], value: float) -> Tensor:
    longest = max(part.shape[1] for part in parts)
    return torch.cat(
        [torch.nn.functional.pad(p, (0, longest - p.shape[1]), value=value) for p in parts]
    )
