"""Rewards by the names a recipe gives them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from latent_rl.cli.errors import UserError, exit_code
from latent_rl.cli.recipe_rewards import BUILT_IN, resolve_reward
from latent_rl.config import RecipeError, RewardRecipe
from latent_rl.rewards import NamedRewardModel, RewardStop, reward_name, score_all
from latent_rl.rewards.judge import PairwiseJudge, PointwiseJudge
from tests.rewards.fake_endpoint import endpoint
from tests.rewards.test_reward_model import classifier, tokenizer

JUDGE = {"rubric": "mmrole", "model": "m", "base_url": "http://x/v1"}


def made(function: str, **settings: Any) -> Any:
    return resolve_reward(RewardRecipe(function, 1.0, settings), "rl.rewards[0]", Path())


SETTINGS: dict[str, dict[str, Any]] = {
    "grounded_facts": {"facts": {"dog": ["puppy"], "cat": []}, "column": "seen"},
    "is_json": {"required": {"answer": "string"}},
    "judge": JUDGE,
    "length_range": {"minimum": 1, "maximum": 9, "tokens": True},
    "matches_answer": {"comparison": "contains", "comparison_settings": {"max_words": 4}},
    "matches_pattern": {"pattern": "a+"},
    "names_the_fact": {"facts": ["one", "two"], "column": "digit"},
    "overlong_penalty": {"max_length": 9, "cache": 3},
    "persona_markers": {"style_words": ["aye"]},
    "repetition_penalty": {"ngram": 2},
    "reward_model": {"model": "org/name", "batch_size": 4},
    "tagged": {"tags": ["think"]},
    "well_formed": {},
}


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_name_makes_a_reward(name: str) -> None:
    reward = made(name, **SETTINGS[name])
    assert callable(reward)
    assert reward_name(reward) == ("name" if name == "reward_model" else name)


def test_a_judge_from_a_recipe_judges(tmp_path: Path) -> None:
    with endpoint() as server:
        settings = {**JUDGE, "base_url": server.url, "cache_dir": str(tmp_path), "timeout": 5}
        judge = made("judge", **settings, dimensions=["fluency", "coherency"])
        assert isinstance(judge, PairwiseJudge)
        call = {"prompts": ["?"], "completions": ["abcd"], "completion_ids": [[]]}
        assert asyncio.run(judge(**call, reference=["ab"])) == [pytest.approx(2 / 9)]
        assert server.asked[0].dimensions == ["fluency", "coherency"]
        assert list(tmp_path.glob("*/*.json"))
        own = {
            "name": "wit",
            "version": "1",
            "task": "Be witty.",
            "low": 0,
            "high": 10,
            "dimensions": [{"name": "wit", "question": "Is it witty?"}],
        }
        alone = made("judge", **{**settings, "rubric": own}, pairwise=False, name="wit")
        assert isinstance(alone, PointwiseJudge)
        assert asyncio.run(alone(**call)) == [0.4]


def test_answers_in_a_recipe() -> None:
    reward = made("matches_answer", comparison="number", between=["<a>", "</a>"], column="n")
    call = {"prompts": ["?"], "completions": ["<a>7</a>"], "completion_ids": [[]]}
    assert reward(**call, n=[7]) == [1.0]


def test_a_reward_model_is_loaded_when_it_first_scores(tmp_path: Path) -> None:
    directory = tmp_path / "charm"
    directory.mkdir()
    with pytest.raises(UserError, match=r"settings.model: .*charm: has no config.json"):
        made("reward_model", model=str(directory))
    classifier().save_pretrained(directory)
    reward = made("reward_model", model=str(directory), batch_size=1)
    assert isinstance(reward, NamedRewardModel)
    tokenizer().save_pretrained(directory)  # not needed until now
    table = score_all(
        [reward],
        prompts=["one two", "red"],
        completions=["three", "house"],
        completion_ids=[[], []],
        columns={},
    )
    assert table.names == ("charm",)
    assert table.keep_mask == (True, True)


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        ("juge", {}, "rl.rewards[0].function: unknown reward 'juge'; did you mean 'judge'?"),
        ("judge", {"model": "m"}, "rl.rewards[0].settings: needs rubric"),
        ("judge", {"rubric": "mmrole"}, "rl.rewards[0].settings: needs model, base_url"),
        ("judge", {**JUDGE, "modle": 1}, "settings: unknown key 'modle'; did you mean 'model'?"),
        ("judge", {**JUDGE, "timeout": "long"}, "settings.timeout: expected a number, got 'long'"),
        ("judge", {**JUDGE, "rubric": "mrole"}, "settings.rubric: unknown rubric 'mrole'; did you"),
        ("judge", {**JUDGE, "rubric": {"name": "x"}}, "settings.rubric: needs version, task"),
        ("judge", {**JUDGE, "dimensions": ["wit"]}, "no dimension wit; known are"),
        ("judge", {**JUDGE, "api_key_env": "NO_SUCH_KEY"}, "variable NO_SUCH_KEY is not set"),
        ("judge", {**JUDGE, "max_requests": 0}, "settings: JudgeSettings: max_requests must be"),
        ("matches_answer", {"comparison": "f2"}, "unknown comparison 'f2'"),
        ("matches_answer", {"between": ["<a>"]}, "settings.between: expected two marks, got 1"),
        (
            "matches_answer",
            {"comparison": "number", "comparison_settings": {"tol": 1}},
            "settings.comparison_settings: unknown key 'tol'",
        ),
        ("length_range", {"min": 1}, "rl.rewards[0].settings: unknown key 'min'; did you mean"),
        ("length_range", {"minimum": 1}, "rl.rewards[0].settings: LengthRange"),
        ("reward_model", {}, "rl.rewards[0].settings: needs model"),
    ],
)
def test_wrong_settings_are_one_clear_line(
    function: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        made(function, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_rewards_ended_is_one_line(capsys: Any) -> None:
    assert exit_code(RewardStop("judge: the budget is spent")) == 2
    assert capsys.readouterr().err == "latent-rl: judge: the budget is spent\n"
