"""Reward functions by the names a recipe gives them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from latent_rl.cli.errors import UserError
from latent_rl.cli.loading import require_model_name
from latent_rl.config import RecipeError, RewardRecipe, build, closest
from latent_rl.rewards import (
    COMPARISONS,
    GroundedFacts,
    IsJson,
    LengthRange,
    MatchesAnswer,
    MatchesPattern,
    NamedRewardModel,
    NamesTheFact,
    OverlongPenalty,
    PersonaMarkers,
    RepetitionPenalty,
    RewardFunction,
    Tagged,
    WellFormed,
)

__all__ = ["BUILT_IN", "resolve_reward"]


@dataclass(frozen=True)
class _JudgeRecipe:
    """What a recipe says of a judge beside `JudgeSettings`.

    rubric     "mmrole", "pcogalign", or a mapping with the fields of `Rubric`
    dimensions of the rubric; empty for all
    pairwise   compare with the reference, or score alone
    """

    rubric: str | dict[str, Any]
    dimensions: tuple[str, ...] = ()
    pairwise: bool = True
    reference_column: str = "reference"
    name: str = "judge"


@dataclass(frozen=True)
class _AnswerRecipe:
    """What a recipe says of `MatchesAnswer`; the comparison by name, with settings of its own."""

    column: str = "answer"
    comparison: str = "exact"
    comparison_settings: Mapping[str, Any] | None = None
    between: tuple[str, ...] = ()
    name: str = "matches_answer"


@dataclass(frozen=True)
class _ModelRecipe:
    """What a recipe says of a reward model."""

    model: str
    batch_size: int | None = None


def _judge(settings: Mapping[str, Any], where: str) -> RewardFunction:
    from latent_rl.rewards.judge import (
        RUBRICS,
        JudgeSettings,
        PairwiseJudge,
        PointwiseJudge,
        Rubric,
    )

    own = _JudgeRecipe.__dataclass_fields__.keys()
    recipe = build(_JudgeRecipe, {k: v for k, v in settings.items() if k in own}, where)
    endpoint = {name: value for name, value in settings.items() if name not in own}
    if isinstance(recipe.rubric, str):
        if recipe.rubric not in RUBRICS:
            known = closest(recipe.rubric, RUBRICS)
            raise RecipeError(f"{where}.rubric: unknown rubric {recipe.rubric!r}{known}")
        rubric = RUBRICS[recipe.rubric]
    else:
        rubric = build(Rubric, recipe.rubric, f"{where}.rubric")
    if recipe.dimensions:
        rubric = rubric.only(recipe.dimensions)
    kind = PairwiseJudge if recipe.pairwise else PointwiseJudge
    return kind(
        build(JudgeSettings, endpoint, where),
        rubric,
        reference_column=recipe.reference_column,
        name=recipe.name,
    )


def _matches_answer(settings: Mapping[str, Any], where: str) -> RewardFunction:
    recipe = build(_AnswerRecipe, settings, where)
    if recipe.comparison not in COMPARISONS:
        known = closest(recipe.comparison, COMPARISONS)
        raise RecipeError(f"{where}.comparison: unknown comparison {recipe.comparison!r}{known}")
    if len(recipe.between) not in (0, 2):
        raise RecipeError(f"{where}.between: expected two marks, got {len(recipe.between)}")
    comparison = _called(
        COMPARISONS[recipe.comparison],
        recipe.comparison_settings or {},
        f"{where}.comparison_settings",
    )
    between = (recipe.between[0], recipe.between[1]) if recipe.between else None
    return MatchesAnswer(recipe.column, comparison, between=between, name=recipe.name)


def _reward_model(settings: Mapping[str, Any], where: str) -> RewardFunction:
    recipe = build(_ModelRecipe, settings, where)
    require_model_name(recipe.model, f"{where}.model")
    return NamedRewardModel(recipe.model, batch_size=recipe.batch_size)


def _called(make: Callable[..., Any], settings: Mapping[str, Any], where: str) -> Any:
    """What `make` makes of keyword arguments, unknown ones named."""
    known = inspect.signature(make).parameters
    for name in settings:
        if name not in known:
            raise RecipeError(f"{where}: unknown key {name!r}{closest(str(name), known)}")
    return make(**settings)


def _plain(make: Callable[..., Any]) -> Callable[[Mapping[str, Any], str], RewardFunction]:
    def made(settings: Mapping[str, Any], where: str) -> RewardFunction:
        return cast("RewardFunction", _called(make, settings, where))

    return made


BUILT_IN: Mapping[str, Callable[[Mapping[str, Any], str], RewardFunction]] = {
    "grounded_facts": _plain(GroundedFacts),
    "is_json": _plain(IsJson),
    "judge": _judge,
    "length_range": _plain(LengthRange),
    "matches_answer": _matches_answer,
    "matches_pattern": _plain(MatchesPattern),
    "names_the_fact": _plain(NamesTheFact),
    "overlong_penalty": _plain(OverlongPenalty),
    "persona_markers": _plain(PersonaMarkers),
    "repetition_penalty": _plain(RepetitionPenalty),
    "reward_model": _reward_model,
    "tagged": _plain(Tagged),
    "well_formed": _plain(WellFormed),
}
"""(settings, place in the recipe) -> reward, by name."""


def resolve_reward(reward: RewardRecipe, where: str, recipe_dir: Path) -> RewardFunction:
    """The function a recipe names: built-in, or "module:name" found from the recipe's directory,
    the working directory or the environment.

    A built-in is made with `settings`. An imported name is the reward itself, unless `settings` are
    given: then it is called with them to make the reward.

    Raises:
        RecipeError, UserError: when there is no such function, or it cannot be made.
    """
    place = f"{where}.settings"
    try:
        if ":" in reward.function:
            found = _imported(reward.function, where, recipe_dir)
            made = found(**reward.settings) if reward.settings else found
            return cast("RewardFunction", made)
        if reward.function in BUILT_IN:
            return BUILT_IN[reward.function](reward.settings, place)
    except (RecipeError, UserError):
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"{place}: {error}") from error
    raise RecipeError(
        f"{where}.function: unknown reward {reward.function!r}"
        f"{closest(reward.function, BUILT_IN)} (your own are named module:function)"
    )


def _imported(name: str, where: str, recipe_dir: Path) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    search = [str(recipe_dir.resolve()), str(Path.cwd())]
    sys.path[:0] = search
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(f"{where}.function: cannot import {module_name!r}: {error}") from error
    finally:
        for entry in search:
            sys.path.remove(entry)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise RecipeError(f"{where}.function: module {module_name!r} has no function {attribute!r}")
    return cast("Callable[..., Any]", found)
