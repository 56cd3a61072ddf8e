"""The steps of a recipe as objects: what each needs, checks and trains."""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from latent_rl.cli import recipe_data
from latent_rl.cli.errors import UserError
from latent_rl.cli.recipe_rewards import resolve_reward
from latent_rl.cli.run_dir import content_fingerprint, fingerprint
from latent_rl.config import (
    DataRecipe,
    Recipe,
    RecipeError,
    RLRecipe,
    StageRecipe,
    build,
    closest,
)
from latent_rl.train import (
    Arm,
    ArmJob,
    BehaviourCloning,
    InverseWarmup,
    Joint,
    LatentArm,
    LatentGRPOConfig,
    ProjectorWarmup,
    Stage,
    StageArguments,
    StageTrainer,
    TaskSFT,
    TokenArm,
    run_arm,
    token_arguments,
)
from latent_rl.train.losses import ALGORITHMS

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel
    from latent_rl.rewards.protocol import RewardFunction

__all__ = ["STAGES", "Step", "make_steps"]

STAGES: Mapping[str, type[Stage]] = {
    stage.name: stage
    for stage in (InverseWarmup, ProjectorWarmup, Joint, BehaviourCloning, TaskSFT)
}
RL, BASELINE = "rl", "baseline"

# Set by the run itself.
_RESERVED = ("output_dir", "seed", "overwrite_output_dir", "resume_from_checkpoint")


@dataclass(frozen=True)
class Step(ABC):
    """One step: its directory's name, its rows and what makes it the same step on a later run."""

    name: str
    rows: list[dict[str, Any]]
    fingerprint: str

    @property
    def tunes_backbone(self) -> bool:
        """Whether the step changes the backbone, so that its result must hold it."""
        return False

    @property
    def is_arm(self) -> bool:
        """Whether the step is one of several that start from the last stage, and none from it."""
        return False

    def save(self, model: LatentActionModel, directory: Path, *, include_backbone: bool) -> None:
        """Write what the step made of `model`."""
        model.save_pretrained(directory, include_backbone=include_backbone)

    @abstractmethod
    def check_arguments(self, work: Path) -> None:
        """Raise ValueError for arguments that cannot be, without touching `work`."""

    @abstractmethod
    def train(
        self, model: LatentActionModel, processor: Any, work: Path, *, resume: bool
    ) -> list[dict[str, Any]]:
        """Train in `work` and return the log."""


@dataclass(frozen=True)
class StageStep(Step):
    """A stage."""

    stage: Stage
    arguments: Mapping[str, Any]

    @property
    def tunes_backbone(self) -> bool:
        """See :class:`Step`; a stage that tunes the backbone cannot use cached features."""
        return not self.stage.cacheable

    def check_arguments(self, work: Path) -> None:
        """See :class:`Step`."""
        _arguments(StageArguments, self.arguments, work, self.name)

    def train(
        self, model: LatentActionModel, processor: Any, work: Path, *, resume: bool
    ) -> list[dict[str, Any]]:
        """See :class:`Step`."""
        trainer = StageTrainer(
            model,
            self.stage,
            _arguments(StageArguments, self.arguments, work, self.name),
            train_dataset=self.rows,
            processing_class=processor,
        )
        trainer.train(resume_from_checkpoint=resume)
        return cast("list[dict[str, Any]]", trainer.state.log_history)


@dataclass(frozen=True)
class RLStep(Step):
    """Reinforcement learning of the latent policy."""

    rewards: tuple[RewardFunction, ...]
    arguments: Mapping[str, Any]

    @property
    def is_arm(self) -> bool:
        """See :class:`Step`."""
        return True

    def check_arguments(self, work: Path) -> None:
        """See :class:`Step`."""
        self._settings(work)

    def train(
        self, model: LatentActionModel, processor: Any, work: Path, *, resume: bool
    ) -> list[dict[str, Any]]:
        """See :class:`Step`."""
        job = ArmJob(self.rewards, self.rows, processor)
        run = run_arm(self._arm(model), job, self._settings(work), resume=resume)
        return [dict(entry) for entry in run.history]

    def _settings(self, work: Path) -> LatentGRPOConfig:
        found: LatentGRPOConfig = _arguments(LatentGRPOConfig, self.arguments, work, self.name)
        return found

    def _arm(self, model: LatentActionModel) -> Arm:
        return LatentArm(lambda: model)


@dataclass(frozen=True)
class BaselineStep(RLStep):
    """The same over tokens, by TRL; its result is a plain model, not a latent-action one."""

    def check_arguments(self, work: Path) -> None:
        """See :class:`Step`."""
        try:
            token_arguments(self._settings(work))
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.name}: {error}") from error

    def save(self, model: LatentActionModel, directory: Path, *, include_backbone: bool) -> None:
        """See :class:`Step`."""
        cast(Any, model.backbone).save_pretrained(directory)

    def _arm(self, model: LatentActionModel) -> Arm:
        return TokenArm(lambda: model.backbone)


def make_steps(recipe: Recipe, recipe_dir: Path) -> list[Step]:
    """Every step of a recipe, with data read and every name looked up.

    Raises:
        RecipeError, UserError: for an unknown stage, setting, argument, algorithm, reward or
            format, and for data that is missing or has wrong columns.
    """
    steps: list[Step] = []
    previous = fingerprint(dataclasses.asdict(recipe.model))
    for index, item in enumerate(recipe.stages):
        previous = _chained(previous, recipe, item)
        steps.append(_stage_step(recipe, item, index, previous))
    if recipe.rl is not None:
        mark = _chained(previous, recipe, recipe.rl)
        steps += _rl_steps(recipe, recipe.rl, recipe_dir, mark)
    return steps


def _chained(previous: str, recipe: Recipe, item: StageRecipe | RLRecipe) -> str:
    return fingerprint(
        {
            "previous": previous,
            # A baseline beside it does not make RL another step.
            "step": {k: v for k, v in dataclasses.asdict(item).items() if k != "baseline"},
            "data": {name: _data_mark(recipe.data[name]) for name in item.data},
            "seed": recipe.seed,
            "arguments": dict(recipe.arguments),
        }
    )


def _data_mark(data: DataRecipe) -> dict[str, Any]:
    """What makes a data set the same on a later run: what the recipe says, and the file's rows."""
    return {**dataclasses.asdict(data), "content": content_fingerprint(data.path)}


def _stage_step(recipe: Recipe, item: StageRecipe, index: int, mark: str) -> StageStep:
    where = f"stages[{index}]"
    name = item.stage.replace("-", "_")
    if name not in STAGES:
        raise RecipeError(f"{where}.stage: unknown stage {item.stage!r}{closest(name, STAGES)}")
    rows = [row for d in item.data for row in recipe_data.conversations(d, recipe.data[d])]
    return StageStep(
        name=f"{index + 1:02d}-{name}",
        rows=rows,
        fingerprint=mark,
        stage=build(STAGES[name], item.settings, f"{where}.settings"),
        arguments=_merged(recipe, item.arguments, StageArguments, where),
    )


def _rl_steps(recipe: Recipe, item: RLRecipe, recipe_dir: Path, mark: str) -> list[RLStep]:
    """The latent arm, and the token arm where the recipe wants it."""
    if item.algorithm not in ALGORITHMS:
        raise RecipeError(
            f"rl.algorithm: unknown algorithm {item.algorithm!r}"
            f"{closest(item.algorithm, ALGORITHMS)}"
        )
    rewards = tuple(
        resolve_reward(reward, f"rl.rewards[{i}]", recipe_dir)
        for i, reward in enumerate(item.rewards)
    )
    own = {
        **item.arguments,
        "loss_type": item.algorithm,
        "reward_weights": [reward.weight for reward in item.rewards],
    }
    _refuse_reserved(item.arguments, "rl")
    rows = [row for d in item.data for row in recipe_data.prompts(d, recipe.data[d])]
    number = f"{len(recipe.stages) + 1:02d}"
    arguments = _merged(recipe, own, LatentGRPOConfig, "rl")
    steps = [RLStep(f"{number}-{RL}", rows, mark, rewards, arguments)]
    if item.baseline is not None:
        changed = item.baseline.arguments
        _merged(recipe, changed, LatentGRPOConfig, "rl.baseline")
        _refuse_reserved(changed, "rl.baseline")
        mark = fingerprint({"rl": mark, "baseline": dataclasses.asdict(item.baseline)})
        name = f"{number}-{BASELINE}"
        steps.append(BaselineStep(name, rows, mark, rewards, {**arguments, **changed}))
    return steps


def _refuse_reserved(arguments: Mapping[str, Any], where: str) -> None:
    for name in ("loss_type", "reward_weights"):
        if name in arguments:
            raise RecipeError(f"{where}.arguments.{name}: is set by rl.algorithm and rl.rewards")


def _merged(recipe: Recipe, own: Mapping[str, Any], cls: type[Any], where: str) -> dict[str, Any]:
    """Arguments of one step: the shared ones, its own over them, names checked."""
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    for place, given in (("arguments", recipe.arguments), (f"{where}.arguments", own)):
        for name in given:
            if name in _RESERVED:
                raise RecipeError(f"{place}.{name}: is set by the run (output, seed, --resume)")
            if name not in known:
                raise RecipeError(f"{place}: unknown key {name!r}{closest(name, known)}")
    return {"report_to": "none", **recipe.arguments, **own, "seed": recipe.seed}


def _arguments(cls: type[Any], given: Mapping[str, Any], work: Path, where: str) -> Any:
    machine = {
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Said aloud, or transformers refuses bf16 where there is no accelerator, dry runs included.
        "use_cpu": not torch.accelerator.is_available(),
    }
    try:
        return cls(output_dir=str(work), **{**machine, **given})
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
