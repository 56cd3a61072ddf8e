"""Answerers: a latent policy through the decoding engine, and models that choose tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from latent_rl.data import render_prompts
from latent_rl.decode import Decoder
from latent_rl.eval.answering import Answer, Row, Sampling
from latent_rl.ops import sample_codes

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["FixedAnswers", "LatentAnswerer", "TokenAnswerer"]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class LatentAnswerer:
    """A latent policy: codes are drawn, the world model says the likeliest token under each."""

    def __init__(
        self,
        model: LatentActionModel,
        processor: Any,
        *,
        name: str = "latent policy",
        details: Mapping[str, Any] = _NOTHING,
        slots: int = 64,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> None:
        """The model is put in evaluation mode.

        Args:
            model: trained, on the device to run on.
            processor: the model's.
            name, details: see :class:`latent_rl.eval.Answerer`.
            slots: answers decoded at once, at most.
            top_k, top_p, min_p: truncation of the codes' distribution.
        """
        self.name = name
        truncation = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        self.details: Mapping[str, Any] = {**details, **truncation}
        self._top_k, self._top_p, self._min_p = top_k, top_p, min_p
        self._model, self._processor = model.eval(), processor
        self._decoder = Decoder(model, slots=slots, tokenizer=processor.tokenizer)

    @property
    def num_codes(self) -> int:
        """K."""
        return self._model.latent_config.num_codes

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], seeds: Tensor, sampling: Sampling) -> list[list[Answer]]:
        """See :class:`latent_rl.eval.Answerer`."""
        inputs = _inputs(self._processor, rows, self._model.device)
        out = self._decoder.generate(
            inputs,
            max_new_tokens=sampling.max_new_tokens,
            num_generations=seeds.shape[1],
            temperature=sampling.temperature,
            top_k=self._top_k,
            top_p=self._top_p,
            min_p=self._min_p,
            seed=seeds.reshape(-1).to(self._model.device),
        )
        made, keep_mask = out.generation, out.generation.completion_mask
        return _answers(
            self._processor,
            [ids[keep].tolist() for ids, keep in zip(made.completion_ids, keep_mask, strict=True)],
            [codes[keep].tolist() for codes, keep in zip(made.codes, keep_mask, strict=True)],
            [reason == "stop" for reason in out.finish_reasons],
            seeds.shape[1],
        )


class TokenAnswerer:
    """A model that chooses tokens: a base model, or one tuned by token-level RL.

    Tokens come from the answers' own seeds, so an answer does not depend on the batch around it
    (up to the rounding of batched matrix products).
    """

    num_codes = None

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        name: str = "token model",
        details: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """The model is put in evaluation mode.

        Args:
            model: an image-text model of transformers with ``generate``; for the base model of a
                latent-action model, its ``backbone``.
            processor: the model's.
            name, details: see :class:`latent_rl.eval.Answerer`.
        """
        self.name, self.details = name, details
        self._model: Any = model.eval()
        self._processor = processor

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], seeds: Tensor, sampling: Sampling) -> list[list[Answer]]:
        """See :class:`latent_rl.eval.Answerer`."""
        device = self._model.device
        inputs = _inputs(self._processor, [row for row in rows for _ in seeds[0]], device)
        length = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            flat = seeds.reshape(-1).to(device)
            processors.append(SeededTemperature(flat, length, sampling.temperature))
        sequences = self._model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            # The processor leaves only the drawn token, which greedy decoding then takes.
            do_sample=False,
            num_beams=1,
            logits_processor=processors,
        )
        ends = _end_ids(self._model)
        cut = [_cut(row, ends) for row in sequences[:, length:].tolist()]
        finished = [bool(row) and row[-1] in ends for row in cut]
        return _answers(self._processor, cut, [[] for _ in cut], finished, seeds.shape[1])


class SeededTemperature(LogitsProcessor):
    """Draws tokens at a temperature from row seeds, leaving only the drawn one."""

    def __init__(self, seeds: Tensor, prompt_length: int, temperature: float) -> None:
        """``seeds``: int64 [B]."""
        self._seeds, self._prompt_length = seeds, prompt_length
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] with all but one entry per row at -inf."""
        step = input_ids.shape[1] - self._prompt_length
        drawn = sample_codes(
            scores.float(), temperature=self._temperature, seed=self._seeds, offset=step
        ).codes
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


class FixedAnswers:
    """Answers written down beforehand: references, human answers."""

    num_codes = None

    def __init__(
        self,
        answers: Mapping[Any, Sequence[str]],
        *,
        column: str = "id",
        name: str = "fixed answers",
        details: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """Make an answerer of texts.

        Args:
            answers: by a row's value in ``column``, its texts; taken in order, from the first
                again where more samples are asked for.
            column: dataset column that identifies a row.
            name, details: see :class:`latent_rl.eval.Answerer`.
        """
        self.name, self.details = name, details
        self._answers, self._column = answers, column

    def answer(self, rows: Sequence[Row], seeds: Tensor, sampling: Sampling) -> list[list[Answer]]:
        """See :class:`latent_rl.eval.Answerer`; tokens are the words."""
        found = []
        for row in rows:
            texts = self._answers[row[self._column]]
            chosen = [texts[i % len(texts)] for i in range(seeds.shape[1])]
            found.append([Answer(text, tuple(range(len(text.split())))) for text in chosen])
        return found


def _inputs(processor: Any, rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    rendered = render_prompts(processor, rows)
    return {name: value.to(device) for name, value in rendered.items()}


def _answers(
    processor: Any,
    tokens: Sequence[Sequence[int]],
    codes: Sequence[Sequence[int]],
    finished: Sequence[bool],
    samples: int,
) -> list[list[Answer]]:
    texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    flat = [
        Answer(text.strip(), tuple(ids), tuple(acts), end)
        for text, ids, acts, end in zip(texts, tokens, codes, finished, strict=True)
    ]
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


def _end_ids(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return {int(end) for end in ends} if isinstance(ends, (list, tuple)) else {int(ends)}


def _cut(ids: list[int], ends: set[int]) -> list[int]:
    """Ids up to the first end token, it included; padding follows it."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids
