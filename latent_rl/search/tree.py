"""Monte Carlo tree search over sequences of codes: the tree itself, knowing no model.

Selection is AlphaZero's PUCT (arXiv 1712.01815) with the policy as prior. A node is a prefix of
codes; what it is worth and where it can go is somebody else's to say (:class:`Evaluation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["BACKUPS", "Evaluation", "Node", "Tree", "TreeSettings", "puct"]


def puct(q: float, prior: float, parent_visits: int, visits: int, c_puct: float) -> float:
    """q + c_puct * prior * sqrt(parent_visits) / (1 + visits)."""
    return q + c_puct * prior * math.sqrt(parent_visits) / (1 + visits)


@dataclass(frozen=True)
class Evaluation:
    """What was found out about a node.

    Attributes:
        codes: the node's whole prefix: what was forced, and the rest of its segment.
        value: of the node; any scale, higher is better.
        proposals: (code, prior) of the ways on, priors positive; none where the answer ends.
    """

    codes: tuple[int, ...]
    value: float
    proposals: tuple[tuple[int, float], ...] = ()


@dataclass
class Node:
    """A prefix of codes.

    Attributes:
        codes: the prefix; until it is evaluated, its parent's and the code that leads here.
        prior: of the policy, among its siblings.
        evaluated: whether :class:`Evaluation` is in.
        visits: simulations that came through.
        pending: simulations on their way.
        total, best: sum and maximum of the values they brought.
        children: ways on; none yet, or none at all.
        exhausted: nothing below is left to find out.
    """

    codes: tuple[int, ...]
    prior: float = 1.0
    evaluated: bool = False
    visits: int = 0
    pending: int = 0
    total: float = 0.0
    best: float = -math.inf
    children: list[Node] = field(default_factory=list)
    exhausted: bool = False


BACKUPS: Mapping[str, Callable[[Node], float]] = MappingProxyType(
    {"mean": lambda node: node.total / node.visits, "max": lambda node: node.best}
)
"""What a visited node is worth: the mean of its simulations, or, since codes lead to one text
only, the best of them."""


@dataclass(frozen=True)
class TreeSettings:
    """How a tree is searched.

    Attributes:
        c_puct: weight of the prior against values, which are scaled to [0, 1] by the range seen
            in the tree (as in MuZero, arXiv 1911.08265): rewards have any scale.
        backup: "mean" or "max", see ``BACKUPS``.
    """

    c_puct: float = 1.5
    backup: str = "mean"

    def __post_init__(self) -> None:
        if not self.c_puct >= 0:
            raise ValueError(f"TreeSettings: c_puct must be >= 0, got {self.c_puct}")
        if self.backup not in BACKUPS:
            raise ValueError(
                f"TreeSettings: backup must be one of {', '.join(BACKUPS)}, got {self.backup!r}"
            )


class Tree:
    """One search. Select a leaf, have it evaluated, give the evaluation back.

    Several leaves may be out at once: a selected path counts as visited, with the lowest value
    seen, until its evaluation is back (virtual loss). What is exhausted is not selected again, so
    with as many simulations as it has nodes the search has seen every one. Equal scores go to the
    earlier proposal; nothing is random.
    """

    def __init__(self, settings: TreeSettings) -> None:
        self._c_puct, self._worth = settings.c_puct, BACKUPS[settings.backup]
        self.root = Node(())
        self._low, self._high = math.inf, -math.inf

    def select(self) -> list[Node] | None:
        """The path from the root to a node to evaluate; None when all that is left to find out is
        on its way or nothing is left."""
        path = [self.root]
        while path[-1].evaluated:
            open_ones = [c for c in path[-1].children if not c.exhausted and not _waits(c)]
            if not open_ones:
                break
            path.append(max(open_ones, key=self._scorer(path[-1])))
        leaf = path[-1]
        if leaf.evaluated or leaf.pending:
            return None
        for node in path:
            node.pending += 1
        return path

    def update(self, path: Sequence[Node], evaluation: Evaluation) -> None:
        """Take the evaluation of a selected path's leaf.

        Raises:
            ValueError: for a value that is not finite, or proposals that repeat a code.
        """
        leaf, value = path[-1], evaluation.value
        if not math.isfinite(value):
            raise ValueError(f"Tree: values must be finite, got {value}")
        codes = [code for code, _ in evaluation.proposals]
        if len(set(codes)) < len(codes):
            raise ValueError(f"Tree: proposals must not repeat a code, got {codes}")
        leaf.evaluated, leaf.codes = True, evaluation.codes
        leaf.children = [Node((*leaf.codes, code), prior) for code, prior in evaluation.proposals]
        self._low, self._high = min(self._low, value), max(self._high, value)
        for node in reversed(path):
            node.pending -= 1
            node.visits += 1
            node.total += value
            node.best = max(node.best, value)
            node.exhausted = node.evaluated and all(child.exhausted for child in node.children)

    def nodes(self) -> Iterator[Node]:
        """Every evaluated node, parents first."""
        queue = [self.root]
        while queue:
            node = queue.pop()
            if node.evaluated:
                yield node
                queue += reversed(node.children)

    def _scorer(self, parent: Node) -> Callable[[Node], float]:
        visits = parent.visits + parent.pending
        # Nothing is known of a child not yet visited: it is worth what its parent is.
        unknown = self._scaled(self._worth(parent))

        def score(child: Node) -> float:
            if not child.visits:
                return puct(unknown, child.prior, visits, 0, self._c_puct)
            # A simulation on its way counts as the lowest value, 0 once scaled.
            count = child.visits + child.pending
            q = self._scaled(self._worth(child)) * child.visits / count
            return puct(q, child.prior, visits, count, self._c_puct)

        return score

    def _scaled(self, value: float) -> float:
        spread = self._high - self._low
        return (value - self._low) / spread if spread > 0 else 0.0


def _waits(node: Node) -> bool:
    """Whether everything to find out below is on its way already."""
    if not node.pending or not node.evaluated:
        return node.pending > 0
    return all(child.exhausted or _waits(child) for child in node.children)
