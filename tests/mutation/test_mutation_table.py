"""The table of mutations fits the code it breaks; running it is ``python -m tests.mutation``."""

import pytest

from latent_rl.backends import OPS
from tests.mutation.runner import ROOT, Mutation
from tests.mutation.table import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_breaks_one_place_that_exists(mutation) -> None:
    mutation.source(ROOT)
    assert mutation.old != mutation.new
    for test in mutation.tests:
        if not test.startswith("-"):
            assert (ROOT / test.split("::")[0]).exists(), test


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_broken_somewhere(op) -> None:
    assert any(op in mutation.path for mutation in MUTATIONS)


def test_names_are_unique() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_table_that_fell_behind_is_refused(tmp_path) -> None:
    (tmp_path / "kernel.cpp").write_text("a a")
    with pytest.raises(ValueError, match="must contain 'a' once, found 2"):
        Mutation("op: x", "kernel.cpp", "a", "b", ()).source(tmp_path)
