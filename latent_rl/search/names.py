"""Searches by name, such as "best-of-8", "majority-of-8" or "tree-of-32"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from latent_rl.eval.answering import Answerer
from latent_rl.rewards import RewardFunction
from latent_rl.search.candidates import CodeSource
from latent_rl.search.choosers import BestScore, Chooser, CodeMedoid, Majority, softmax_weights
from latent_rl.search.code_tree import SearchBudget, TreeSearch, TreeSearchSettings
from latent_rl.search.sampled import SampledSearch
from latent_rl.search.scorers import MeanLogprob, RewardScore, Scorer

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["SCORERS", "SEARCHES", "SearchContext", "parse_search", "search_by_name"]

_NAME = re.compile(r"([a-z-]+)-of-(\d+)(?::([a-z]+))?")


@dataclass(frozen=True)
class SearchContext:
    """What searches are made of.

    Attributes:
        model, processor: a latent-action model and its processor.
        reward_funcs, reward_weights: for searches that choose by reward.
        name: what results call the search; None for one made of the policy and the method.
        details: of the policy, such as its checkpoint; kept with the results.
        slots: answers decoded at once, at most.
    """

    model: LatentActionModel
    processor: Any
    reward_funcs: Sequence[RewardFunction] = ()
    reward_weights: Sequence[float] | None = None
    name: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    slots: int = 64

    def sampled(self, candidates: int, chooser: Chooser) -> Answerer:
        """Choose among rollouts of the policy."""
        return SampledSearch(
            self._source(), candidates, chooser, name=self.name, details=self.details
        )

    def tree(self, scorer: Scorer, settings: TreeSearchSettings) -> Answerer:
        """Search the policy's codes."""
        return TreeSearch(self._source(), scorer, settings, name=self.name, details=self.details)

    def _source(self) -> CodeSource:
        return CodeSource(self.model, self.processor, slots=self.slots)


def _reward(context: SearchContext) -> Scorer:
    if not context.reward_funcs:
        raise ValueError("search: choosing by reward needs a reward; give one, or use ':logprob'")
    return RewardScore(context.reward_funcs, context.reward_weights)


SCORERS: Mapping[str, Callable[[SearchContext], Scorer]] = MappingProxyType(
    {"reward": _reward, "logprob": lambda context: MeanLogprob()}
)
"""What comes after the colon of a name."""


@dataclass(frozen=True)
class _Method:
    """A search and what it chooses by when its name does not say."""

    make: Callable[[SearchContext, int, Scorer], Answerer]
    scorer: str


def _best(context: SearchContext, count: int, scorer: Scorer) -> Answerer:
    return context.sampled(count, BestScore(scorer))


def _majority(context: SearchContext, count: int, scorer: Scorer) -> Answerer:
    return context.sampled(count, Majority(scorer))


def _weighted(context: SearchContext, count: int, scorer: Scorer) -> Answerer:
    chooser = Majority(scorer, weights_of=softmax_weights, name="weighted majority")
    return context.sampled(count, chooser)


def _medoid(context: SearchContext, count: int, scorer: Scorer) -> Answerer:
    return context.sampled(count, CodeMedoid())


def _tree(context: SearchContext, count: int, scorer: Scorer) -> Answerer:
    settings = TreeSearchSettings(budget=SearchBudget(simulations=count), segment_length=4)
    return context.tree(scorer, settings)


SEARCHES: Mapping[str, _Method] = MappingProxyType(
    {
        "best": _Method(_best, "reward"),
        "majority": _Method(_majority, "logprob"),
        "weighted-majority": _Method(_weighted, "logprob"),
        "medoid": _Method(_medoid, "logprob"),
        "tree": _Method(_tree, "reward"),
    }
)
"""What comes before "-of-"."""


def search_by_name(name: str, context: SearchContext) -> Answerer:
    """The answerer that a name means: METHOD-of-N, with :SCORER where the method has a choice.

    ``best-of-8`` (the best of 8 by reward), ``best-of-8:logprob``, ``majority-of-8`` and
    ``weighted-majority-of-8`` (votes over normalised answers, ties or weights by the codes'
    log-probability), ``medoid-of-8`` (the middle one of the code sequences), ``tree-of-32`` (32
    simulations in segments of 4 codes).

    Raises:
        ValueError: for a name that is none, or a search by reward without rewards.
    """
    method, count, scorer = parse_search(name)
    return SEARCHES[method].make(context, count, SCORERS[scorer](context))


def parse_search(name: str) -> tuple[str, int, str]:
    """Method, N and scorer of a name, see :func:`search_by_name`.

    Raises:
        ValueError: for a name that is none.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in SEARCHES or int(match[2]) < 1:
        known = ", ".join(f"{method}-of-N" for method in SEARCHES)
        raise ValueError(f"search: name must be one of {known} with N >= 1, got {name!r}")
    scorer = match[3] or SEARCHES[match[1]].scorer
    if scorer not in SCORERS:
        raise ValueError(
            f"search: {name!r} must choose by one of {', '.join(SCORERS)}, got {scorer!r}"
        )
    return match[1], int(match[2]), scorer
