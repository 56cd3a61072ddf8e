"""Searches over a tiny policy: chosen by hand, exact against enumeration, budgets kept."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from latent_rl.data import render_prompts
from latent_rl.decode import Decoder
from latent_rl.eval import LatentAnswerer, Sampling, answer_seeds
from latent_rl.ops import row_seeds
from latent_rl.search import (
    SEARCHES,
    AnswererSource,
    BestScore,
    CallableScore,
    CodeMedoid,
    CodeSource,
    CriticPruned,
    Majority,
    MeanLogprob,
    PolicyTopK,
    RewardScore,
    SampledSearch,
    SearchBudget,
    SearchContext,
    TreeSearch,
    TreeSearchSettings,
    TreeSettings,
    medoid,
    search_by_name,
)
from tests.train.tiny_world import prompts, tiny_model

K, T = 4, 3
SHORT = Sampling(temperature=1.0, max_new_tokens=T)
NODES = 1 + K + K**2 + K**3


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    """A model of 4 codes that matter, and its processor."""
    return tiny_model(act=0.3, num_codes=K)


@pytest.fixture
def source(policy) -> CodeSource:
    return CodeSource(*policy)


def value_of(codes: tuple[int, ...]) -> float:
    """A reward without structure: good prefixes say nothing."""
    return (hash(codes) % 1009) / 1009


BY_CODES = CallableScore(lambda row, candidate: value_of(candidate.answer.codes), "codes")


def seeds(rows: int, samples: int = 1, seed: int = 0) -> torch.Tensor:
    return answer_seeds(seed, "test", range(rows), samples)


def even_tokens(*, completion_ids, **columns):
    return [sum(t % 2 == 0 for t in ids) / max(1, len(ids)) for ids in completion_ids]


class TestCandidates:
    def test_they_are_the_decoders(self, policy, source) -> None:
        rows, given = prompts(3), torch.arange(6).reshape(3, 2)
        found = source.sample(rows, given, SHORT)
        out = Decoder(policy[0]).generate(
            render_prompts(policy[1], rows),
            max_new_tokens=T,
            num_generations=2,
            seed=given.flatten(),
        )
        for index, one in enumerate(itertools.chain.from_iterable(found)):
            keep = out.generation.completion_mask[index]
            assert one.answer.codes == tuple(out.generation.codes[index][keep].tolist())
            assert one.answer.tokens == tuple(out.generation.completion_ids[index][keep].tolist())
            total = float(out.generation.logprobs_full[index][keep].double().sum())
            assert one.logprob == pytest.approx(total, abs=1e-6)
            assert one.mean_logprob == pytest.approx(total / int(keep.sum()), abs=1e-6)
            assert one.answer.finished == (out.finish_reasons[index] == "stop")

    def test_more_candidates_leave_the_first_ones_alone(self, source) -> None:
        rows, chosen = prompts(2), []

        class Notes:
            name, details = "notes", {}

            def choose(self, rows, groups):
                chosen.append(groups)
                return [0] * len(groups)

        for count in (2, 5):
            SampledSearch(source, count, Notes()).answer(rows, seeds(2, 3), SHORT)
        few, many = chosen
        assert len(few) == len(many) == 6
        assert all(group == more[:2] for group, more in zip(few, many, strict=True))
        assert len({c.answer.codes for group in many for c in group}) > 5


class TestSampled:
    def test_best_of_n_takes_the_best_and_counts_all(self, source) -> None:
        rows = prompts(3)
        search = SampledSearch(source, 6, BestScore(BY_CODES))
        found = search.answer(rows, seeds(3, 2), SHORT)
        drawn = source.sample(
            rows,
            torch.stack([torch.cat([row_seeds(s, 6) for s in r]) for r in seeds(3, 2).tolist()]),
            SHORT,
        )
        for answers, own in zip(found, drawn, strict=True):
            for answer, group in zip(answers, (own[:6], own[6:]), strict=True):
                assert value_of(answer.codes) == max(value_of(c.answer.codes) for c in group)
                assert answer.spent_tokens == answer.cost == sum(len(c.answer.codes) for c in group)
        assert search.name == "latent policy, best of 6"
        assert search.details == {"search": "best", "candidates": 6, "chosen_by": "codes"}
        assert search.num_codes == K

    def test_best_of_1_is_the_policy(self, policy, source) -> None:
        rows = prompts(2)
        alone = source.sample(rows, torch.stack([row_seeds(int(s), 1) for s in seeds(2)]), SHORT)
        found = SampledSearch(source, 1, BestScore(MeanLogprob())).answer(rows, seeds(2), SHORT)
        assert [[a.codes for a in own] for own in found] == [
            [c.answer.codes for c in own] for own in alone
        ]

    def test_a_candidate_without_a_score_is_not_chosen(self, source) -> None:
        scorer = CallableScore(
            lambda row, c: math.nan if c.answer.codes[0] != 1 else value_of(c.answer.codes), "some"
        )
        (answers,) = SampledSearch(source, 40, BestScore(scorer)).answer(
            prompts(1), seeds(1), SHORT
        )
        assert answers[0].codes[0] == 1
        nothing = BestScore(CallableScore(lambda row, c: math.nan, "nothing"))
        with pytest.raises(RuntimeError, match="nothing scored none of 4"):
            SampledSearch(source, 4, nothing).answer(prompts(1), seeds(1), SHORT)

    def test_a_reward_function_chooses_by_its_own_columns(self, source) -> None:
        def wants_the_row(*, completion_ids, answer, **columns):
            return [-abs(sum(ids) % 8 - a) for ids, a in zip(completion_ids, answer, strict=True)]

        rows = prompts(4)
        scorer = RewardScore([wants_the_row, even_tokens], weights=[1.0, 0.1])
        drawn = source.sample(rows, torch.arange(20).reshape(4, 5), SHORT)
        flat = [c for own in drawn for c in own]
        scores = scorer([row for row in rows for _ in range(5)], flat)
        for score, candidate, index in zip(scores, flat, range(20), strict=True):
            ids = candidate.answer.tokens
            expected = -abs(sum(ids) % 8 - index // 5) + 0.1 * even_tokens(completion_ids=[ids])[0]
            assert score == pytest.approx(expected, abs=1e-6)
        assert scorer.name == "reward wants_the_row + even_tokens"

    def test_the_majority_speaks_through_its_best_scored_voter(self, source) -> None:
        rows = prompts(2)
        vote = Majority(BY_CODES, answer_of=lambda text: len(text) % 2)
        drawn = source.sample(rows, torch.arange(14).reshape(2, 7), SHORT)
        for group, index in zip(drawn, vote.choose(rows, drawn), strict=True):
            odd = [len(c.answer.text) % 2 for c in group]
            winner = int(sum(odd) > len(odd) / 2)
            voters = [c for c, o in zip(group, odd, strict=True) if o == winner]
            assert group[index] in voters
            assert value_of(group[index].answer.codes) == max(
                value_of(c.answer.codes) for c in voters
            )

    def test_the_medoid_needs_codes(self, policy, source) -> None:
        rows = prompts(1)
        (group,) = source.sample(rows, torch.arange(6)[None], SHORT)
        assert CodeMedoid().choose(rows, [group]) == [medoid([c.answer.codes for c in group])]

        bare = [
            dataclasses.replace(c, answer=dataclasses.replace(c.answer, codes=())) for c in group
        ]
        with pytest.raises(ValueError, match="candidates must have codes"):
            CodeMedoid().choose(rows, [bare])

    def test_any_answerer_can_be_searched(self, policy, source) -> None:
        other = AnswererSource(LatentAnswerer(*policy))
        rows = prompts(2)
        score = CallableScore(lambda row, c: value_of(c.answer.codes), "codes")
        ours = SampledSearch(source, 4, BestScore(score)).answer(rows, seeds(2), SHORT)
        theirs = SampledSearch(other, 4, BestScore(score)).answer(rows, seeds(2), SHORT)
        assert [a.codes for own in ours for a in own] == [a.codes for own in theirs for a in own]
        with pytest.raises(ValueError, match="no log-probabilities"):
            SampledSearch(other, 2, BestScore(MeanLogprob())).answer(rows, seeds(2), SHORT)


def tree_search(source: CodeSource, simulations: int, **changes) -> TreeSearch:
    given = {
        "budget": SearchBudget(simulations),
        "proposer": PolicyTopK(K),
        "leaves_per_round": 4,
    }
    return TreeSearch(source, BY_CODES, TreeSearchSettings(**{**given, **changes}))


def everything(source: CodeSource, row: dict) -> dict[tuple[int, ...], float]:
    """Every answer of at most T codes and its value, by brute force."""
    forced = torch.tensor(list(itertools.product(range(K), repeat=T)))
    inputs = [render_prompts(source.processor, [row])]
    out = source.decode(
        inputs, torch.zeros(1, len(forced), dtype=torch.int64), SHORT, forced_codes=forced
    )
    return {c.answer.codes: value_of(c.answer.codes) for c in source.candidates(out)}


class TestTree:
    @pytest.mark.parametrize("leaves", [1, 4])
    def test_with_as_many_simulations_as_nodes_it_finds_the_optimum(self, source, leaves) -> None:
        rows = prompts(2)
        search = tree_search(source, NODES, leaves_per_round=leaves)
        found = search.answer(rows, seeds(2), SHORT)
        for (answer,), row, tree in zip(found, rows, search.trees, strict=True):
            values = everything(source, row)
            assert value_of(answer.codes) == max(values.values())
            assert tree.root.exhausted
            ends = {n.codes for n in tree.nodes() if not n.children}
            assert ends == set(values)

    @pytest.mark.parametrize("simulations", [1, 5, 17])
    def test_never_better_than_enumeration_and_visits_add_up(self, source, simulations) -> None:
        rows = prompts(2)
        search = tree_search(source, simulations)
        found = search.answer(rows, seeds(2), SHORT)
        for (answer,), row, tree in zip(found, rows, search.trees, strict=True):
            assert value_of(answer.codes) <= max(everything(source, row).values())
            assert value_of(answer.codes) == tree.root.best
            assert tree.root.visits == simulations
            for node in tree.nodes():
                assert node.visits == 1 + sum(child.visits for child in node.children)

    def test_more_simulations_never_find_less(self, source) -> None:
        rows = prompts(1)
        best = [
            value_of(
                tree_search(source, n, leaves_per_round=1).answer(rows, seeds(1), SHORT)[0][0].codes
            )
            for n in (1, 4, 16, 64)
        ]
        assert best == sorted(best)
        assert best[0] < best[-1]

    def test_the_same_seed_gives_the_same_search_whatever_stands_beside(self, source) -> None:
        rows, given = prompts(3), seeds(3, 2)
        search = tree_search(source, 9)
        found = search.answer(rows, given, SHORT)
        assert search.answer(rows, given, SHORT) == found
        assert search.answer(rows[1:2], given[1:2], SHORT) == found[1:2]
        assert search.answer(rows[1:2], given[1:2, 1:], SHORT)[0] == found[1][1:]
        assert search.answer(rows, seeds(3, 2, seed=1), SHORT) != found

    def test_at_temperature_0_seeds_are_ignored_and_the_search_still_looks_around(
        self, source
    ) -> None:
        rows, cold = prompts(1), Sampling(temperature=0.0, max_new_tokens=T)
        search = tree_search(source, 12)
        found = search.answer(rows, seeds(1), cold)
        assert search.answer(rows, seeds(1, seed=5), cold) == found
        (greedy,) = source.sample(rows, torch.zeros(1, 1, dtype=torch.int64), cold)
        assert value_of(found[0][0].codes) > value_of(greedy[0].answer.codes)

    def test_priors_are_the_policys(self, policy, source) -> None:
        model, processor = policy
        rows = prompts(1)
        search = tree_search(source, 6)
        search.answer(rows, seeds(1), SHORT)
        (tree,) = search.trees
        inputs = render_prompts(processor, rows)

        def expected(codes: tuple[int, ...]) -> list[float]:
            forced = torch.tensor([[*codes, *[0] * (T - len(codes))]])
            out = model.generate(inputs, max_new_tokens=T, forced_codes=forced, return_hidden=True)
            with torch.no_grad():
                logits = model.policy_logits(model.state(out.trace), out.trace)
            return logits[0, out.prompt_length - 1 + len(codes)].softmax(-1).tolist()

        looked = 0
        for node in tree.nodes():
            if node.children:
                priors = {child.codes[-1]: child.prior for child in node.children}
                wanted = dict(enumerate(expected(node.codes)))
                assert priors == pytest.approx(wanted, abs=1e-5)
                # The most likely first: the tree prefers the earlier of equals.
                order = [child.prior for child in node.children]
                assert order == sorted(order, reverse=True)
                looked += 1
        assert looked > 2

    def test_only_proposed_codes_are_entered(self, source) -> None:
        rows = prompts(1)
        search = tree_search(source, NODES, proposer=PolicyTopK(2))
        search.answer(rows, seeds(1), SHORT)
        (tree,) = search.trees
        assert tree.root.visits <= 1 + 2 + 4 + 8
        assert tree.root.exhausted
        assert all(len(node.children) in (0, 2) for node in tree.nodes())

    def test_a_segment_is_one_decision(self, source) -> None:
        rows, longer = prompts(1), Sampling(max_new_tokens=6)
        search = tree_search(source, 12, segment_length=2)
        search.answer(rows, seeds(1), longer)
        (tree,) = search.trees
        for node in tree.nodes():
            assert len(node.codes) % 2 == 0 or not node.children
            for child in node.children:
                assert child.codes[: len(node.codes)] == node.codes
                assert len(child.codes) == len(node.codes) + (2 if child.evaluated else 1)
        assert max(len(node.codes) for node in tree.nodes()) >= 4

    def test_the_token_budget_is_kept_and_reported(self, source) -> None:
        rows = prompts(1)
        search = tree_search(source, 50, budget=SearchBudget(50, tokens=4 * T + 2))
        ((answer,),) = search.answer(rows, seeds(1), SHORT)
        assert search.trees[0].root.visits == 4
        assert answer.spent_tokens == answer.cost <= 4 * T + 2
        with pytest.raises(ValueError, match=r"tokens \(2\) must allow one answer"):
            tree_search(source, 5, budget=SearchBudget(5, tokens=2)).answer(rows, seeds(1), SHORT)

    def test_the_clock_ends_a_search_that_has_an_answer(self, source, monkeypatch) -> None:
        now = itertools.count(0.0, 1.0)
        monkeypatch.setattr("time.monotonic", lambda: next(now))
        # One tick before the first round, one more before each: three rounds start in time.
        search = tree_search(source, 50, budget=SearchBudget(50, seconds=3.5), leaves_per_round=1)
        search.answer(prompts(2), seeds(2), SHORT)
        assert [tree.root.visits for tree in search.trees] == [3, 3]
        late = tree_search(source, 50, budget=SearchBudget(50, seconds=0.5), leaves_per_round=1)
        assert len(late.answer(prompts(2), seeds(2), SHORT)) == 2
        assert [tree.root.visits for tree in late.trees] == [1, 1]

    def test_a_state_value_replaces_scores_of_unfinished_answers(self, source) -> None:
        rows = prompts(1)

        def constant(features: torch.Tensor) -> torch.Tensor:
            assert features.shape[1] == 64
            return torch.full(features.shape[:1], 7.0)

        search = tree_search(source, 9, state_value=constant, state_value_weight=1.0)
        search.answer(rows, seeds(1), SHORT)
        for node in search.trees[0].nodes():
            if node.children and all(not child.visits for child in node.children):
                assert node.total == 7.0
            if not node.children:
                assert node.total == pytest.approx(value_of(node.codes))
        assert search.details["state_value_weight"] == 1.0

    def test_a_critic_prunes_what_the_policy_suggests(self) -> None:
        logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, -torch.inf]])
        values = torch.tensor([[0.0, 5.0, 9.0, 99.0], [1.0, 1.0, 2.0, 9.0]])
        found = CriticPruned(lambda features: values, candidates=3, k=2)(logits, torch.zeros(2, 1))
        # Code 3 is not among the three most likely; priors keep the policy's proportion e : 1.
        assert [code for code, _ in found[0]] == [1, 2]
        assert found[0][0][1] == pytest.approx(math.e / (1 + math.e))
        assert [code for code, _ in found[1]] == [0, 2]
        assert PolicyTopK(9)(logits, torch.zeros(2, 1))[1] == [
            (code, pytest.approx(1 / 3)) for code in range(3)
        ]

    def test_a_rollout_that_cannot_be_scored_stops_the_search(self, source) -> None:
        scorer = CallableScore(lambda row, c: math.nan, "nothing")
        with pytest.raises(RuntimeError, match="nothing could not score"):
            TreeSearch(source, scorer).answer(prompts(1), seeds(1), SHORT)

    def test_wrong_settings_are_named(self) -> None:
        for make, named in (
            (lambda: SearchBudget(0), "simulations must be >= 1"),
            (lambda: SearchBudget(tokens=0), "tokens must be > 0"),
            (lambda: TreeSearchSettings(segment_length=0), "segment_length must be >= 1"),
            (lambda: TreeSearchSettings(state_value_weight=2), "state_value_weight must be in"),
            (lambda: PolicyTopK(0), "k must be >= 1"),
            (lambda: CriticPruned(lambda f: f, 2, 3), r"k must be in \[1, candidates \(2\)\]"),
        ):
            with pytest.raises(ValueError, match=named):
                make()
        assert TreeSettings().backup == "mean"


class TestNames:
    @pytest.mark.parametrize("method", sorted(SEARCHES))
    def test_every_name_answers(self, policy, method) -> None:
        context = SearchContext(*policy, reward_funcs=[even_tokens])
        search = search_by_name(f"{method}-of-3", context)
        found = search.answer(prompts(2), seeds(2, 2), SHORT)
        assert [len(own) for own in found] == [2, 2]
        assert all(a.cost >= 3 * min(len(a.tokens), 1) for own in found for a in own)
        assert "3" in search.name
        assert "chosen_by" in search.details

    def test_a_name_may_say_what_it_chooses_by(self, policy) -> None:
        context = SearchContext(*policy, reward_funcs=[even_tokens])
        by_reward = search_by_name("best-of-8", context)
        assert by_reward.details["chosen_by"] == "reward even_tokens"
        named = dataclasses.replace(context, name="mine", details={"checkpoint": "here"})
        for name in ("best-of-8", "tree-of-8"):
            search = search_by_name(name, named)
            assert (search.name, search.details["checkpoint"]) == ("mine", "here")
        likely = search_by_name("best-of-8:logprob", context)
        assert likely.details["chosen_by"] == "mean log-probability of codes"
        vote = search_by_name("weighted-majority-of-4:reward", context)
        assert vote.details["chosen_by"] == "vote, weights by reward even_tokens"

    def test_wrong_names_are_refused_with_the_right_ones(self, policy) -> None:
        context = SearchContext(*policy)
        for name in ("beam-of-4", "best-8", "best-of-x", "best-of-4:luck"):
            with pytest.raises(ValueError, match=r"best|reward"):
                search_by_name(name, context)
        with pytest.raises(ValueError, match="needs a reward"):
            search_by_name("best-of-4", context)
        with pytest.raises(ValueError, match="with N >= 1, got 'medoid-of-0'"):
            search_by_name("medoid-of-0", context)
