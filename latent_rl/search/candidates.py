"""Candidates: answers a search chooses from, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from latent_rl.data import render_prompts
from latent_rl.decode import DecodeOutput, Decoder
from latent_rl.eval.answering import Answer, Answerer, Row, Sampling
from latent_rl.ops import row_seeds

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["AnswererSource", "Candidate", "CandidateSource", "CodeSource", "candidate_seeds"]


@dataclass(frozen=True)
class Candidate:
    """An answer and how likely its codes were.

    Attributes:
        answer: text, tokens and codes.
        logprob: sum of the log-probabilities of its codes under the untempered policy, in nats;
            None where the source does not know.
    """

    answer: Answer
    logprob: float | None = None

    @property
    def mean_logprob(self) -> float:
        """Per code.

        Raises:
            ValueError: when the source does not know.
        """
        if self.logprob is None:
            raise ValueError("Candidate: its source gives no log-probabilities of codes")
        return self.logprob / max(1, len(self.answer.codes))


class CandidateSource(Protocol):
    """Samples candidates."""

    @property
    def name(self) -> str:
        """Of the policy behind it."""
        ...

    @property
    def num_codes(self) -> int | None:
        """K, or None without codes."""
        ...

    def sample(
        self, rows: Sequence[Row], seeds: Tensor, sampling: Sampling
    ) -> list[list[Candidate]]:
        """N candidates for each of P rows from seeds int64 [P, N]; a row's depend on it alone."""
        ...


def candidate_seeds(seeds: Tensor, count: int) -> Tensor:
    """Seeds int64 [P, M * N] of N candidates for each of M answers, from those of the answers.

    The first n candidates of an answer are the same however many follow.
    """
    return torch.stack(
        [torch.cat([row_seeds(seed, count) for seed in row]) for row in seeds.tolist()]
    )


class CodeSource:
    """Rollouts of a latent policy; a prompt is read once for all of its candidates."""

    def __init__(
        self,
        model: LatentActionModel,
        processor: Any,
        *,
        name: str = "latent policy",
        slots: int = 64,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> None:
        """The model is put in evaluation mode.

        Args:
            model: trained, on the device to run on.
            processor: the model's.
            name: of the policy.
            slots: candidates decoded at once, at most.
            top_k, top_p, min_p: truncation of the codes' distribution.
        """
        self.name = name
        self.model, self.processor = model.eval(), processor
        self._truncation = (top_k, top_p, min_p)
        self._decoder = Decoder(model, slots=slots, tokenizer=processor.tokenizer)

    @property
    def num_codes(self) -> int | None:
        """K."""
        return self.model.latent_config.num_codes

    def sample(
        self, rows: Sequence[Row], seeds: Tensor, sampling: Sampling
    ) -> list[list[Candidate]]:
        """See :class:`CandidateSource`."""
        out = self.decode([render_prompts(self.processor, list(rows))], seeds, sampling)
        made, count = self.candidates(out), seeds.shape[1]
        return [made[start : start + count] for start in range(0, len(made), count)]

    @torch.no_grad()
    def decode(
        self,
        inputs: Sequence[dict[str, Tensor]],
        seeds: Tensor,
        sampling: Sampling,
        *,
        forced_codes: Tensor | None = None,
        return_hidden: bool = False,
    ) -> DecodeOutput:
        """Decode seeds int64 [P, N] of P rendered prompts, under forced codes [P * N, T] if any."""
        device = self.model.device
        top_k, top_p, min_p = self._truncation
        return self._decoder.generate(
            [{name: value.to(device) for name, value in batch.items()} for batch in inputs],
            max_new_tokens=sampling.max_new_tokens,
            num_generations=seeds.shape[1],
            temperature=sampling.temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seeds.reshape(-1).to(device),
            forced_codes=forced_codes,
            return_hidden=return_hidden,
        )

    def candidates(self, out: DecodeOutput) -> list[Candidate]:
        """What was decoded, in the order of the requests."""
        made = out.generation
        keep = made.completion_mask
        tokens = [ids[row].tolist() for ids, row in zip(made.completion_ids, keep, strict=True)]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        logprobs = made.logprobs_full.double().masked_fill(~keep, 0.0).sum(1).tolist()
        return [
            Candidate(
                Answer(
                    text=text,
                    tokens=tuple(ids),
                    codes=tuple(codes[row].tolist()),
                    finished=reason == "stop",
                ),
                logprob,
            )
            for text, ids, codes, row, reason, logprob in zip(
                texts, tokens, made.codes, keep, out.finish_reasons, logprobs, strict=True
            )
        ]


class AnswererSource:
    """Candidates of any answerer, such as a base model; without log-probabilities."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer

    @property
    def name(self) -> str:
        """The answerer's."""
        return self._answerer.name

    @property
    def num_codes(self) -> int | None:
        """The answerer's."""
        return self._answerer.num_codes

    def sample(
        self, rows: Sequence[Row], seeds: Tensor, sampling: Sampling
    ) -> list[list[Candidate]]:
        """See :class:`CandidateSource`."""
        found = self._answerer.answer(rows, seeds, sampling)
        return [[Candidate(answer) for answer in answers] for answers in found]
