"""`latent-rl train`: runs a recipe, step by step, each one finished or not there at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from latent_rl.cli.errors import UserError
from latent_rl.cli.loading import (
    check_agreement,
    load_backbone,
    load_checkpoint,
    load_processor,
    no_bars_in_logs,
    require_model_name,
    saved_latent_config,
)
from latent_rl.cli.run_dir import RunDirectory, checkpoint_in
from latent_rl.cli.steps import Step, make_steps
from latent_rl.config import ModelRecipe, Recipe, closest, load_recipe
from latent_rl.models import LatentActionModel, LatentConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run_train"]


def run_train(
    path: Path, out: Path | None, only: Sequence[str], *, resume: bool, dry_run: bool
) -> None:
    """Check the whole recipe, then run what of it is not finished.

    Raises:
        UserError, RecipeError, ValueError, OSError: naming what is missing or wrong.
    """
    console = Console()
    no_bars_in_logs()
    recipe = load_recipe(path)
    root = out or recipe.output
    if root is None:
        raise UserError(f"{path}: names no output directory; give --out")
    run = RunDirectory(root)
    steps = make_steps(recipe, path.parent)
    config = _check_model(recipe.model)
    for step in steps:
        step.check_arguments(run.work(step.name))
    chosen = _chosen(steps, only)
    finished = {s.name for s in steps if _is_finished(run, s, resume=resume or s not in chosen)}
    todo = [step for step in chosen if not (resume and step.name in finished)]
    console.print(_plan(steps, todo, finished))
    if dry_run or not todo:
        console.print("nothing trained (dry run)" if dry_run else f"all done: {root}", markup=False)
        return
    with run.held():
        _run_steps(recipe, config, run, steps, todo, finished, console, resume=resume)


def _run_steps(
    recipe: Recipe,
    config: LatentConfig,
    run: RunDirectory,
    steps: list[Step],
    todo: list[Step],
    finished: set[str],
    console: Console,
    *,
    resume: bool,
) -> None:
    from transformers import set_seed

    # Weights of new modules come from the seed too.
    set_seed(recipe.seed)
    model: LatentActionModel | None = None
    processor: Any = None
    done: Path | None = None
    for step in todo:
        before = [s for s in steps[: steps.index(step)] if not s.is_arm]
        start = next((run.final(s.name) for s in reversed(before) if s.name in finished), None)
        if model is None or start != done:
            model = _start_model(recipe.model, config, start)
            processor = processor or _processor(recipe.model, start)
        tuned = any(s.tunes_backbone and s.name in finished for s in before)
        console.print(f"{step.name}: {len(step.rows)} rows", markup=False)
        done = _run_step(
            step,
            model,
            processor,
            run,
            include_backbone=tuned or step.tunes_backbone,
            resume=resume,
        )
        finished.add(step.name)
        console.print(f"{step.name}: wrote {done}", markup=False)


def _run_step(
    step: Step,
    model: LatentActionModel,
    processor: Any,
    run: RunDirectory,
    *,
    include_backbone: bool,
    resume: bool,
) -> Path:
    work = run.start(step.name, step.fingerprint, resume=resume)
    try:
        log = step.train(model, processor, work, resume=resume)
    except BaseException:
        run.abandon(step.name)
        raise
    prepared = Path(tempfile.mkdtemp(prefix=f".{step.name}.", dir=run.root))
    try:
        step.save(model, prepared, include_backbone=include_backbone)
        processor.save_pretrained(prepared)
        (prepared / "log.json").write_text(json.dumps(log, indent=1), encoding="utf-8")
        prepared.chmod(0o755)  # mkdtemp's own mode shuts others out
        return run.finish(step.name, prepared)
    finally:
        shutil.rmtree(prepared, ignore_errors=True)


def _is_finished(run: RunDirectory, step: Step, *, resume: bool) -> bool:
    return run.is_finished(step.name, step.fingerprint) if resume else False


def _check_model(model: ModelRecipe) -> LatentConfig:
    """Settings of the latent modules, after everything that needs no weights is checked."""
    asked = dict(model.latent)
    if model.backbone is not None:
        require_model_name(model.backbone, "model.backbone")
    if model.checkpoint is None:
        return LatentConfig.from_mapping(asked)
    saved, _ = saved_latent_config(checkpoint_in(Path(model.checkpoint)))
    LatentConfig.from_mapping(asked)
    check_agreement(asked, saved, "model.latent")
    return saved


def _start_model(model: ModelRecipe, config: LatentConfig, start: Path | None) -> LatentActionModel:
    """The model of a finished step, of a checkpoint, or a new one on a backbone."""
    if start is not None:
        _, record = saved_latent_config(start)
        included = bool((record.get("base_model") or {}).get("included"))
        return load_checkpoint(start, None if included else model.backbone, model.dtype)
    if model.checkpoint is not None:
        return load_checkpoint(checkpoint_in(Path(model.checkpoint)), model.backbone, model.dtype)
    if model.backbone is None:
        raise UserError("model: needs backbone or checkpoint")
    return LatentActionModel(load_backbone(model.backbone, model.dtype, "model.backbone"), config)


def _processor(model: ModelRecipe, start: Path | None) -> Any:
    if model.processor is not None:
        return load_processor([model.processor], "model.processor")
    checkpoint = None if model.checkpoint is None else checkpoint_in(Path(model.checkpoint))
    candidates = [place for place in (start, checkpoint, model.backbone) if place is not None]
    return load_processor(candidates, "model.processor")


def _chosen(steps: list[Step], only: Sequence[str]) -> list[Step]:
    """The steps `--stage` names, by stage ('joint') or by step ('03-joint')."""
    if not only:
        return steps
    names = {step.name: step for step in steps}
    short = {step.name.partition("-")[2] for step in steps}
    wanted = [name.replace("-", "_") if name not in names else name for name in only]
    for name in wanted:
        if name not in names and name not in short:
            raise UserError(f"--stage: the recipe has no stage {name!r}{closest(name, short)}")
    return [s for s in steps if s.name in wanted or s.name.partition("-")[2] in wanted]


def _plan(steps: list[Step], todo: list[Step], finished: set[str]) -> Table:
    table = Table("step", "rows", "state", title="recipe")
    for step in steps:
        state = "to run" if step in todo else "done" if step.name in finished else "left out"
        table.add_row(step.name, str(len(step.rows)), state)
    return table
