"""Recipes: YAML files that say what to train, on what, and where to; read into frozen dataclasses.

Reading a recipe loads neither torch nor transformers and touches no data: it checks the shape of
the file alone. What the names in it mean (stages, formats, rewards) is looked up by ``latent-rl
train``.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

__all__ = [
    "BaselineRecipe",
    "DataRecipe",
    "ModelRecipe",
    "RLRecipe",
    "Recipe",
    "RecipeError",
    "RewardRecipe",
    "StageRecipe",
    "build",
    "closest",
    "load_recipe",
]

FORMAT_VERSION = 1
T = TypeVar("T")


class RecipeError(ValueError):
    """Something a recipe says cannot be; the message names the place and the cause."""


@dataclass(frozen=True)
class ModelRecipe:
    """Where the model comes from.

    Attributes:
        backbone: name or directory of an image-text model.
        checkpoint: directory of a latent-action checkpoint to start from; with it, `backbone` may
            be left out (the checkpoint names or holds one).
        processor: name or directory of the processor; None: the backbone's.
        dtype: of the backbone: "auto", "float32", "bfloat16" or "float16".
        latent: fields of `LatentConfig`; with `checkpoint` they must agree with it.
    """

    backbone: str | None = None
    checkpoint: str | None = None
    processor: str | None = None
    dtype: str = "auto"
    latent: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backbone is None and self.checkpoint is None:
            raise RecipeError("needs backbone, checkpoint or both")
        if self.dtype not in DTYPES:
            raise RecipeError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class DataRecipe:
    """One data set.

    Attributes:
        path: file of rows.
        format: "chat" (JSON or JSON lines of Hugging Face chat rows), "paper", "mmrole" or
            "pcogalign".
        image_root: directory that relative image paths start from; None: the file's.
        limit: rows to use at most.
    """

    path: Path
    format: str = "chat"
    image_root: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise RecipeError(f"limit must be >= 1, got {self.limit}")


@dataclass(frozen=True)
class StageRecipe:
    """One training stage.

    Attributes:
        stage: name of the stage.
        data: names of data sets, mixed by concatenation.
        settings: fields of the stage object.
        arguments: fields of `StageArguments` (a `transformers.TrainingArguments`).
    """

    stage: str
    data: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardRecipe:
    """One reward.

    Attributes:
        function: a built-in name, or "module:function" of your own.
        weight: in the sum of rewards.
        settings: arguments that make the reward, where it is a class or a factory.
    """

    function: str
    weight: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BaselineRecipe:
    """The token-level arm: TRL's trainer on the same prompts, rewards and budget.

    Attributes:
        arguments: fields of `LatentGRPOConfig` that are not as in `rl`, such as a learning rate.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RLRecipe:
    """Reinforcement learning after the stages.

    Attributes:
        data: names of data sets of prompts.
        rewards: at least one.
        algorithm: name of the loss.
        arguments: fields of `LatentGRPOConfig`.
        baseline: also train the base model over tokens, from the same stages; None does not.
    """

    data: tuple[str, ...]
    rewards: tuple[RewardRecipe, ...]
    algorithm: str = "grpo"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    baseline: BaselineRecipe | None = None

    def __post_init__(self) -> None:
        if not self.rewards:
            raise RecipeError("needs at least one reward")


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        model: where the model comes from.
        data: data sets by name.
        stages: run in this order; each hands its model to the next.
        rl: reinforcement learning at the end.
        output: directory of the run; `--out` overrides it.
        seed: of everything.
        arguments: `TrainingArguments` fields that all stages and RL share.
        version: of this format.
    """

    model: ModelRecipe
    data: Mapping[str, DataRecipe]
    stages: tuple[StageRecipe, ...] = ()
    rl: RLRecipe | None = None
    output: Path | None = None
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.version != FORMAT_VERSION:
            raise RecipeError(f"version must be {FORMAT_VERSION}, got {self.version}")
        if not self.stages and self.rl is None:
            raise RecipeError("needs stages, rl or both")
        users = [(f"stages[{i}]", stage.data) for i, stage in enumerate(self.stages)]
        if self.rl is not None:
            users.append(("rl", self.rl.data))
        for where, names in users:
            if not names:
                raise RecipeError(f"{where}.data: names no data set")
            for name in names:
                if name not in self.data:
                    raise RecipeError(
                        f"{where}.data: no data set {name!r}{closest(name, self.data)}"
                    )


DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: for a file that is missing, no YAML, or says something unknown or impossible.
    """
    source = Path(path)
    if not source.is_file():
        raise RecipeError(f"{source}: no such recipe")
    try:
        values = yaml.load(source.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{source}: not readable as YAML: {' '.join(str(error).split())}"
        ) from None
    try:
        return build(Recipe, values, "")
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None


def build(cls: type[T], values: Any, where: str) -> T:
    """Make a dataclass from a mapping, every key and type checked.

    Args:
        cls: the dataclass; fields may be plain types, unions, tuples, mappings and dataclasses.
        values: what the file says.
        where: path of `values` in the file, for messages.

    Raises:
        RecipeError: naming the place.
    """
    place = where or "recipe"
    if not isinstance(values, Mapping):
        raise RecipeError(f"{place}: expected a mapping, got {_kind(values)}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise RecipeError(f"{place}: unknown key {key!r}{closest(str(key), fields)}")
    missing = [
        name
        for name, item in fields.items()
        if name not in values
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{place}: needs {', '.join(missing)}")
    prefix = f"{where}." if where else ""
    converted = {key: _convert(hints[key], value, prefix + key) for key, value in values.items()}
    try:
        return cls(**converted)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}" if where else str(error)) from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{place}: {error}") from error


def closest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' or '; known are ...', to end a message with."""
    names = sorted(known)
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(names)}" if names else ""


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, where)
    if origin is tuple:
        # One item may stand for a list of one.
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        item_hint = typing.get_args(hint)[0]
        return tuple(_convert(item_hint, item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin in (Mapping, dict):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}: expected a mapping, got {_kind(value)}")
        item_hint = typing.get_args(hint)[1]
        return {
            str(key): _convert(item_hint, item, f"{where}.{key}") for key, item in value.items()
        }
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, where)
    return _convert_scalar(hint, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _convert(options[0], value, where)
    for option in options:
        try:
            return _convert(option, value, where)
        except RecipeError:
            continue
    raise RecipeError(f"{where}: {_kind(value)} fits none of {', '.join(map(str, options))}")


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    # bool is an int to Python, not to a reader of a recipe.
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"{where}: expected {_NAMES.get(hint, hint.__name__)}, got {_kind(value)}")


_NAMES: Mapping[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.2) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
