"""The search tree by hand, on toy worlds small enough to enumerate, and its invariants."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_rl.search import Evaluation, Tree, TreeSettings, puct


def test_puct_by_hand() -> None:
    # 0.5 + 1.5 * 0.2 * sqrt(9) / (1 + 2)
    assert puct(0.5, 0.2, 9, 2, 1.5) == pytest.approx(0.8)
    assert puct(0.5, 0.2, 9, 2, 0.0) == 0.5
    assert puct(0.0, 0.25, 16, 0, 2.0) == 2.0


class Toy:
    """Sequences of exactly ``depth`` codes below ``width``, with fixed values and priors.

    An inner node's rollout goes on with a code that depends on the seed alone.
    """

    def __init__(self, width: int, depth: int, seed: int = 0, scale: float = 1.0, shift: float = 0):
        self.width, self.depth = width, depth
        rng = random.Random(seed)
        self.values = {
            codes: shift + scale * rng.random()
            for codes in itertools.product(range(width), repeat=depth)
        }
        self.priors = [0.5 + rng.random() for _ in range(width)]
        self.asked: list[tuple[int, ...]] = []

    def evaluate(self, codes: tuple[int, ...], draw: int) -> tuple[Evaluation, tuple[int, ...]]:
        self.asked.append(codes)
        rng = random.Random(hash((codes, draw)))
        whole = codes + tuple(rng.randrange(self.width) for _ in range(self.depth - len(codes)))
        total = sum(self.priors)
        ways = (
            () if len(codes) == self.depth else [(k, p / total) for k, p in enumerate(self.priors)]
        )
        return Evaluation(codes, self.values[whole], tuple(ways)), whole

    @property
    def nodes(self) -> int:
        return sum(self.width**level for level in range(self.depth + 1))


def run(toy: Toy, simulations: int, batch: int = 1, **changes) -> tuple[Tree, float]:
    """Search; returns the tree and the best value of any rollout."""
    tree, best, done = Tree(TreeSettings(**changes)), -math.inf, 0
    while done < simulations:
        paths = []
        while len(paths) < min(batch, simulations - done) and (path := tree.select()):
            paths.append(path)
        if not paths:
            break
        for path in paths:
            evaluation, _ = toy.evaluate(path[-1].codes, done)
            best = max(best, evaluation.value)
            tree.update(path, evaluation)
            done += 1
    return tree, best


def test_the_first_selections_by_hand() -> None:
    tree = Tree(TreeSettings(c_puct=1.5))
    ways = ((4, 0.6), (7, 0.4))
    tree.update(tree.select(), Evaluation((), 0.5, ways))
    # Nothing known apart from the root: 1.5 * 0.6 * 1 / 1 = 0.9 against 0.6.
    path = tree.select()
    assert path[-1].codes == (4,)
    tree.update(path, Evaluation((4,), 0.0, ways))
    # The range is [0, 0.5], the root's mean 0.25 scales to 0.5, which the other child inherits:
    # 0 + 1.5 * 0.6 * sqrt(2) / 2 = 0.636 against 0.5 + 1.5 * 0.4 * sqrt(2) / 1 = 1.349.
    path = tree.select()
    assert path[-1].codes == (7,)
    tree.update(path, Evaluation((7,), 0.5, ways))
    # 0 + 1.5 * 0.6 * sqrt(3) / 2 = 0.779 against 1 + 1.5 * 0.4 * sqrt(3) / 2 = 1.520; below, 4 has
    # the larger prior.
    path = tree.select()
    assert [node.codes for node in path] == [(), (7,), (7, 4)]
    root = tree.root
    assert (root.visits, root.total, root.best, root.pending) == (3, 1.0, 0.5, 1)


def test_a_child_not_yet_visited_is_worth_what_its_parent_is() -> None:
    tree = Tree(TreeSettings(c_puct=1.0))
    ways = ((0, 0.8), (1, 0.2))
    tree.update(tree.select(), Evaluation((), 0.0, ((1, 0.9), (0, 0.1))))
    tree.update(tree.select(), Evaluation((1,), 1.0, ways))
    first, second = tree.root.children
    first.prior, second.prior = 0.2, 0.8
    # 1 + 0.2 sqrt(2) / 2 = 1.141 against 0.5 + 0.8 sqrt(2) = 1.631; were it worth 0, 1.131.
    assert tree.select()[1] is second


def test_a_path_on_its_way_counts_as_the_lowest_value() -> None:
    tree = Tree(TreeSettings(c_puct=0.1))
    ways = ((0, 0.5), (1, 0.5))
    tree.update(tree.select(), Evaluation((), 0.0, ways))
    tree.update(tree.select(), Evaluation((0,), 1.0, ways))
    # 1 + 0.05 sqrt(2) / 2 = 1.035 against 0.5 + 0.05 sqrt(2) = 0.571.
    assert tree.select()[-1].codes == (0, 0)
    # (1 + 0) / 2 + 0.05 sqrt(3) / 3 = 0.529 against 0.5 + 0.05 sqrt(3) = 0.587.
    assert tree.select()[-1].codes == (1,)


def test_what_is_on_its_way_is_not_selected_again() -> None:
    tree = Tree(TreeSettings())
    ways = ((0, 0.9), (1, 0.1))
    first = tree.select()
    assert tree.select() is None  # the root is on its way
    tree.update(first, Evaluation((), 1.0, ways))
    assert tree.select()[-1].codes == (0,)
    assert tree.select()[-1].codes == (1,)
    assert tree.select() is None


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(("width", "depth"), [(2, 3), (3, 2), (4, 3), (1, 3)])
def test_with_as_many_simulations_as_nodes_it_is_exhaustive(width, depth, batch) -> None:
    toy = Toy(width, depth)
    tree, best = run(toy, toy.nodes, batch)
    assert best == max(toy.values.values())
    assert len(toy.asked) == len(set(toy.asked)) == toy.nodes
    assert tree.root.exhausted
    assert tree.select() is None
    # More simulations find nothing more to do.
    assert run(Toy(width, depth), toy.nodes + 50, batch)[0].root.visits == toy.nodes


@given(
    width=st.integers(1, 4),
    depth=st.integers(1, 4),
    simulations=st.integers(1, 60),
    batch=st.integers(1, 9),
    seed=st.integers(0, 99),
    backup=st.sampled_from(["mean", "max"]),
)
@settings(max_examples=60, deadline=None)
def test_visits_add_up_and_nothing_beats_enumeration(
    width, depth, simulations, batch, seed, backup
) -> None:
    toy = Toy(width, depth, seed)
    tree, best = run(toy, simulations, batch, backup=backup)
    assert tree.root.visits == len(toy.asked) == min(simulations, toy.nodes)
    for node in tree.nodes():
        assert node.visits == 1 + sum(child.visits for child in node.children)
        assert node.pending == 0
        assert node.best >= node.total / node.visits - 1e-12
        if node.children:
            assert sum(child.prior for child in node.children) == pytest.approx(1)
    assert tree.root.best == best <= max(toy.values.values())


@given(
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.25, 8.0]),
    shift=st.sampled_from([-4.0, 2.0]),
)
@settings(max_examples=20, deadline=None)
def test_the_scale_of_rewards_does_not_matter(seed, scale, shift) -> None:
    plain, other = Toy(3, 3, seed), Toy(3, 3, seed, scale=scale, shift=shift)
    run(plain, 25)
    run(other, 25)
    assert plain.asked == other.asked


def test_values_lead_the_search() -> None:
    """The best of many arms is visited most, whatever the mean says of chance."""
    tree = Tree(TreeSettings(c_puct=0.5))
    tree.update(tree.select(), Evaluation((), 0.0, tuple((k, 0.25) for k in range(4))))
    for _ in range(40):
        path = tree.select()
        codes = path[-1].codes
        ways = tuple((k, 0.25) for k in range(4))
        tree.update(path, Evaluation(codes, float(codes[0] == 2), ways))
    visits = {child.codes[0]: child.visits for child in tree.root.children}
    assert visits[2] > 3 * max(count for code, count in visits.items() if code != 2)


def test_a_sure_prior_is_followed_to_the_end() -> None:
    tree = Tree(TreeSettings())
    for depth in range(5):
        path = tree.select()
        assert path[-1].codes == (1,) * depth
        tree.update(path, Evaluation(path[-1].codes, 0.0, ((0, 0.001), (1, 0.999))))


def test_backup_by_the_best_prefers_one_good_answer_to_a_good_mean() -> None:
    def favourite(backup: str) -> int:
        tree = Tree(TreeSettings(c_puct=0.0, backup=backup))
        tree.update(tree.select(), Evaluation((), 0.0, ((0, 0.5), (1, 0.5))))
        for codes, value in {(0,): 0.6, (1,): 1.0, (1, 0): 0.0, (1, 1): 0.0}.items():
            path = [tree.root]
            for code in codes:
                path.append(path[-1].children[code])
            for node in path:
                node.pending += 1
            tree.update(path, Evaluation(codes, value, ((0, 0.5), (1, 0.5))))
        return tree.select()[1].codes[0]

    assert favourite("mean") == 0  # 0.6 against a mean of 1/3
    assert favourite("max") == 1


def test_wrong_settings_and_evaluations_are_named() -> None:
    with pytest.raises(ValueError, match="c_puct must be >= 0"):
        TreeSettings(c_puct=-1)
    with pytest.raises(ValueError, match="backup must be one of mean, max, got 'sum'"):
        TreeSettings(backup="sum")
    tree = Tree(TreeSettings())
    path = tree.select()
    with pytest.raises(ValueError, match="finite"):
        tree.update(path, Evaluation((), math.nan))
    with pytest.raises(ValueError, match="repeat a code"):
        tree.update(path, Evaluation((), 0.0, ((1, 0.5), (1, 0.5))))
