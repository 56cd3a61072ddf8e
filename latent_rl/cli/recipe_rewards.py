"""Reward functions by the names a recipe gives them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from latent_rl.config import RecipeError, RewardRecipe, closest
from latent_rl.rewards import NamesTheFact, RewardFunction, WellFormed

__all__ = ["BUILT_IN", "resolve_reward"]

BUILT_IN: Mapping[str, Callable[..., RewardFunction]] = {
    "names_the_fact": cast("Callable[..., RewardFunction]", NamesTheFact),
    "well_formed": cast("Callable[..., RewardFunction]", WellFormed),
}


def resolve_reward(reward: RewardRecipe, where: str, recipe_dir: Path) -> RewardFunction:
    """The function a recipe names: built-in, or "module:name" found from the recipe's directory,
    the working directory or the environment.

    A built-in is made with `settings`. An imported name is the reward itself, unless `settings` are
    given: then it is called with them to make the reward.

    Raises:
        RecipeError: when there is no such function, or it cannot be made.
    """
    if ":" in reward.function:
        found = _imported(reward.function, where, recipe_dir)
        if not reward.settings:
            return cast("RewardFunction", found)
    elif reward.function in BUILT_IN:
        found = BUILT_IN[reward.function]
    else:
        raise RecipeError(
            f"{where}.function: unknown reward {reward.function!r}"
            f"{closest(reward.function, BUILT_IN)} (your own are named module:function)"
        )
    try:
        return cast("RewardFunction", found(**reward.settings))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}.settings: {error}") from error


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
