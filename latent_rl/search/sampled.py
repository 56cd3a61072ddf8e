"""Searches that draw candidates independently and choose one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from latent_rl.eval.answering import Answer, Row, Sampling
from latent_rl.search.candidates import CandidateSource, candidate_seeds
from latent_rl.search.choosers import Chooser

__all__ = ["SampledSearch"]


class SampledSearch:
    """An answerer that draws N candidates for every answer and chooses one of them."""

    def __init__(
        self,
        source: CandidateSource,
        candidates: int,
        chooser: Chooser,
        *,
        name: str | None = None,
        details: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Draw from ``source``, ``candidates`` for each answer.

        Args:
            source, candidates, chooser: what is drawn, how many, and who chooses.
            name: of the answerer; None for one made of source and method.
            details: of the source, kept beside the search's own.

        Raises:
            ValueError: for fewer than 1 candidate.
        """
        if candidates < 1:
            raise ValueError(f"SampledSearch: candidates must be >= 1, got {candidates}")
        self._source, self._candidates, self._chooser = source, candidates, chooser
        self._name, self._details = name, details

    @property
    def name(self) -> str:
        """Of source and method, such as "latent policy, best of 8"."""
        return self._name or f"{self._source.name}, {self._chooser.name} of {self._candidates}"

    @property
    def num_codes(self) -> int | None:
        """K of the source."""
        return self._source.num_codes

    @property
    def details(self) -> Mapping[str, Any]:
        """See :class:`latent_rl.eval.Answerer`."""
        own = {"search": self._chooser.name, "candidates": self._candidates}
        return {**self._details, **own, **self._chooser.details}

    def answer(self, rows: Sequence[Row], seeds: Tensor, sampling: Sampling) -> list[list[Answer]]:
        """See :class:`latent_rl.eval.Answerer`; every answer has candidates of its own."""
        count = self._candidates
        drawn = self._source.sample(rows, candidate_seeds(seeds, count), sampling)
        groups = [own[at : at + count] for own in drawn for at in range(0, len(own), count)]
        each = [row for row in rows for _ in range(seeds.shape[1])]
        chosen = iter(
            dataclasses.replace(
                group[index].answer, spent_tokens=sum(one.answer.cost for one in group)
            )
            for group, index in zip(groups, self._chooser.choose(each, groups), strict=True)
        )
        return [[next(chosen) for _ in range(seeds.shape[1])] for _ in rows]
