"""Latent-action tree search: Monte Carlo tree search over a policy's codes, on the decoder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from latent_rl.data import render_prompts
from latent_rl.decode import DecodeOutput
from latent_rl.eval.answering import Answer, Row, Sampling
from latent_rl.search.candidates import Candidate, CodeSource, candidate_seeds
from latent_rl.search.proposals import PolicyTopK, Proposer, StateValue
from latent_rl.search.scorers import Scorer
from latent_rl.search.tree import Evaluation, Node, Tree, TreeSettings

__all__ = ["SearchBudget", "TreeSearch", "TreeSearchSettings"]


@dataclass(frozen=True)
class SearchBudget:
    """What one answer may cost; the first limit that is reached ends the search.

    Attributes:
        simulations: rollouts.
        tokens: decoded, those of replayed prefixes included; None for no limit. Never exceeded: a
            rollout starts only if the longest possible one fits.
        seconds: of wall time of a whole ``answer`` call, looked at between rounds; None for no
            limit. With one, results depend on the machine.
    """

    simulations: int = 32
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.simulations < 1:
            raise ValueError(f"SearchBudget: simulations must be >= 1, got {self.simulations}")
        for name in ("tokens", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"SearchBudget: {name} must be > 0 or None, got {value}")


@dataclass(frozen=True)
class TreeSearchSettings:
    """How codes are searched.

    Attributes:
        budget: of one answer.
        segment_length: codes of an edge: its first is proposed, the others are drawn by the policy
            when the edge is first taken. 1 makes every code a decision.
        proposer: the ways on from a node.
        leaves_per_round: rollouts of one search decoded together. More fill the machine better and
            choose worse; results depend on it.
        tree: selection and backup.
        state_value: values of the nodes' states, or None.
        state_value_weight: its share in a node's value, in [0, 1]; the rest is the rollout's score.
    """

    budget: SearchBudget = field(default_factory=SearchBudget)
    segment_length: int = 1
    proposer: Proposer = field(default_factory=lambda: PolicyTopK(8))
    leaves_per_round: int = 8
    tree: TreeSettings = field(default_factory=TreeSettings)
    state_value: StateValue | None = None
    state_value_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("segment_length", "leaves_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"TreeSearchSettings: {name} must be >= 1, got {getattr(self, name)}"
                )
        if not 0 <= self.state_value_weight <= 1:
            raise ValueError(
                "TreeSearchSettings: state_value_weight must be in [0, 1], "
                f"got {self.state_value_weight}"
            )


class _Search:
    """One answer's search: its tree, what it has spent, the best answer so far."""

    def __init__(self, row: int, seeds: Sequence[int], settings: TreeSearchSettings) -> None:
        self.row, self._seeds, self._settings = row, seeds, settings
        self.tree = Tree(settings.tree)
        self.started = self.tokens = 0
        self.best: tuple[float, Candidate] | None = None

    def leaves(self, longest: int) -> list[tuple[list[Node], int]]:
        """Paths to evaluate in this round, each with its rollout's seed."""
        budget = self._settings.budget
        found: list[tuple[list[Node], int]] = []
        while len(found) < self._settings.leaves_per_round and self.started < budget.simulations:
            reserved = self.tokens + (len(found) + 1) * longest
            if budget.tokens is not None and reserved > budget.tokens:
                break
            path = self.tree.select()
            if path is None:
                break
            found.append((path, self._seeds[self.started]))
            self.started += 1
        return found

    def take(self, candidate: Candidate, score: float) -> None:
        """Note a rollout."""
        self.tokens += len(candidate.answer.tokens)
        if self.best is None or score > self.best[0]:
            self.best = score, candidate

    def answer(self) -> Answer:
        """The best rollout, with the cost of all."""
        if self.best is None:
            raise ValueError(
                f"TreeSearch: tokens ({self._settings.budget.tokens}) must allow one answer of "
                "max_new_tokens"
            )
        return dataclasses.replace(self.best[1].answer, spent_tokens=self.tokens)


class TreeSearch:
    """An answerer that searches the tree of a latent policy's codes and gives its best rollout.

    Codes determine the text (tokens are the likeliest under them), so a node is a prefix of codes
    and a simulation is: select a node by PUCT, force its prefix, let the policy roll out to the
    end, score the whole answer, back the score up. The decoder reads a prompt once for all
    rollouts of a round; the rollout's own states, run through the small policy tower, give the
    priors of the node's children: expanding costs no pass of the model. After CoLA's tree search
    (arXiv 2503.21383), whose description leaves open how edges, values and budgets are set.

    A rollout costs what one sampled answer costs, its prefix included, so N simulations compare
    with best of N. The search is deterministic for a seed, and complete: given enough
    simulations it has seen every sequence that the proposals span.
    """

    def __init__(
        self,
        source: CodeSource,
        scorer: Scorer,
        settings: TreeSearchSettings | None = None,
        *,
        name: str | None = None,
        details: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Search codes of ``source`` for a high ``scorer``.

        Args:
            source, scorer, settings: what is searched, for what, and how.
            name: of the answerer; None for one made of source and method.
            details: of the source, kept beside the search's own.
        """
        self._source, self._scorer = source, scorer
        self._name, self._details = name, details
        self._settings = settings or TreeSearchSettings()
        self.trees: tuple[Tree, ...] = ()

    @property
    def name(self) -> str:
        """Of policy and method."""
        made = f"{self._source.name}, tree search of {self._settings.budget.simulations}"
        return self._name or made

    @property
    def num_codes(self) -> int | None:
        """K."""
        return self._source.num_codes

    @property
    def details(self) -> Mapping[str, Any]:
        """See :class:`latent_rl.eval.Answerer`."""
        settings = self._settings
        return {
            **self._details,
            "search": "tree",
            "chosen_by": self._scorer.name,
            "simulations": settings.budget.simulations,
            "token_budget": settings.budget.tokens,
            "second_budget": settings.budget.seconds,
            "segment_length": settings.segment_length,
            "proposer": repr(settings.proposer),
            "leaves_per_round": settings.leaves_per_round,
            "c_puct": settings.tree.c_puct,
            "backup": settings.tree.backup,
            "state_value_weight": settings.state_value_weight if settings.state_value else 0.0,
        }

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], seeds: Tensor, sampling: Sampling) -> list[list[Answer]]:
        """See :class:`latent_rl.eval.Answerer`; ``trees`` keeps the searches of the last call.

        Raises:
            RuntimeError: when a rollout cannot be scored.
            ValueError: for a token budget that allows no rollout.
        """
        settings, started = self._settings, time.monotonic()
        samples, simulations = seeds.shape[1], settings.budget.simulations
        streams = candidate_seeds(seeds, simulations).reshape(len(rows), samples, simulations)
        searches = [
            _Search(row, stream, settings)
            for row, own in enumerate(streams.tolist())
            for stream in own
        ]
        prompts = [render_prompts(self._source.processor, [row]) for row in rows]
        self.trees = tuple(search.tree for search in searches)
        while True:
            late = settings.budget.seconds is not None and (
                time.monotonic() - started >= settings.budget.seconds
            )
            # Whatever the time, every search has one answer to give.
            open_ones = [s for s in searches if s.best is None] if late else searches
            round_ = [
                (search, path, seed)
                for search in open_ones
                for path, seed in search.leaves(sampling.max_new_tokens)
            ]
            if not round_:
                break
            for group in _equal_shares(round_):
                self._evaluate(rows, prompts, group, sampling)
        answers = iter([search.answer() for search in searches])
        return [[next(answers) for _ in range(samples)] for _ in rows]

    def _evaluate(
        self,
        rows: Sequence[Row],
        prompts: Sequence[dict[str, Tensor]],
        leaves: Sequence[tuple[_Search, list[Node], int]],
        sampling: Sampling,
    ) -> None:
        """Roll out leaves, equally many of every row among them, and update their trees."""
        chosen = list(dict.fromkeys(search.row for search, _, _ in leaves))
        forced = torch.full((len(leaves), sampling.max_new_tokens), -1, dtype=torch.int64)
        for index, (_, path, _) in enumerate(leaves):
            codes = path[-1].codes
            forced[index, : len(codes)] = torch.tensor(codes, dtype=torch.int64)
        seeds = torch.tensor([seed for _, _, seed in leaves]).reshape(len(chosen), -1)
        out = self._source.decode(
            [prompts[row] for row in chosen],
            seeds,
            sampling,
            forced_codes=forced,
            return_hidden=True,
        )
        candidates = self._source.candidates(out)
        scores = self._scorer([rows[search.row] for search, _, _ in leaves], candidates)
        # How many codes belong to each node: its parent's, and one segment; none to the root.
        depths = [
            len(path[-1].codes) + (self._settings.segment_length - 1 if path[-1].codes else 0)
            for _, path, _ in leaves
        ]
        ends = [depth >= len(c.answer.codes) for depth, c in zip(depths, candidates, strict=True)]
        ways, values = self._look(out, depths, ends)
        weight = self._settings.state_value_weight if self._settings.state_value else 0.0
        for index, (search, path, _) in enumerate(leaves):
            if scores[index] != scores[index]:
                raise RuntimeError(f"TreeSearch: {self._scorer.name} could not score a rollout")
            search.take(candidates[index], scores[index])
            value = scores[index]
            if not ends[index]:
                value = (1 - weight) * value + weight * values[index]
            evaluation = Evaluation(
                codes=candidates[index].answer.codes[: depths[index]],
                value=value,
                proposals=() if ends[index] else tuple(ways[index]),
            )
            search.tree.update(path, evaluation)

    def _look(
        self, out: DecodeOutput, depths: Sequence[int], ends: Sequence[bool]
    ) -> tuple[list[list[tuple[int, float]]], list[float]]:
        """Ways on and state values at each rollout's ``depths``; nothing where it ``ends``."""
        ways: list[list[tuple[int, float]]] = [[] for _ in depths]
        values = [0.0] * len(depths)
        going = [index for index, end in enumerate(ends) if not end]
        trace = out.generation.trace
        if not going or trace is None:
            return ways, values
        device = trace.hidden.device
        model = self._source.model
        picked = trace.select(torch.tensor(going, device=device))
        policy = model.latent.policy
        features = policy.features(model.state(picked), picked.tower_kwargs)
        # The state at the prompt's last position chooses code 0.
        first = out.generation.prompt_length - 1
        at = torch.tensor([first + depths[index] for index in going], device=device)
        here = features[torch.arange(len(going), device=device), at]
        found = self._settings.proposer(policy.logits(here), here)
        critic = self._settings.state_value
        known = [0.0] * len(going) if critic is None else critic(here).double().tolist()
        for index, way, value in zip(going, found, known, strict=True):
            ways[index], values[index] = way, value
        return ways, values


def _equal_shares(
    leaves: Sequence[tuple[_Search, list[Node], int]],
) -> list[list[tuple[_Search, list[Node], int]]]:
    """Leaves by how many their row has: the decoder takes equally many of every prompt."""
    by_row: dict[int, list[tuple[_Search, list[Node], int]]] = {}
    for leaf in leaves:
        by_row.setdefault(leaf[0].row, []).append(leaf)
    shares: dict[int, list[tuple[_Search, list[Node], int]]] = {}
    for own in by_row.values():
        shares.setdefault(len(own), []).extend(own)
    return list(shares.values())
