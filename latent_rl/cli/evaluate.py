"""`latent-rl evaluate`: answers, rewards and diversity of a run, kept as one JSON."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from latent_rl.cli import recipe_data
from latent_rl.cli.errors import UserError
from latent_rl.cli.evaluations import DIRECTORY, metric_table
from latent_rl.cli.loading import (
    load_backbone,
    load_checkpoint,
    load_processor,
    no_bars_in_logs,
    saved_latent_config,
    torch_device,
)
from latent_rl.cli.recipe_rewards import resolve_reward
from latent_rl.cli.run_dir import checkpoint_in, fingerprint, weights_fingerprint
from latent_rl.config import DataRecipe, Recipe, RewardRecipe, load_recipe
from latent_rl.eval import (
    Answerer,
    EvaluationSettings,
    LatentAnswerer,
    SentenceEncoder,
    TokenAnswerer,
    evaluate,
    load_encoder,
    save_evaluation,
    summarise,
)
from latent_rl.eval.references import ReferenceMeasures, measure_references
from latent_rl.rewards import RewardStop
from latent_rl.search import SearchContext, parse_search, search_by_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from latent_rl.eval import Evaluation
    from latent_rl.rewards import RewardFunction

__all__ = ["EvaluateRequest", "run_evaluate"]

_NAME = re.compile(r"^[\w.-]+( [\w.-]+)*$")
_STEP = re.compile(r"^\d\d-\w+$")
_CHECKPOINT, _MODEL = "latent_config.json", "config.json"
_USUAL_SPLITS = ("test", "ood")


@dataclass(frozen=True)
class EvaluateRequest:
    """The options of the command; see its help."""

    run: Path
    recipe: Path | None = None
    splits: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()
    format: str = "chat"
    image_root: Path | None = None
    limit: int | None = None
    settings: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    encoder: str | None = None
    base: bool = False
    search: str | None = None
    name: str | None = None
    out: Path | None = None
    backbone: str | None = None
    processor: str | None = None
    dtype: str = "auto"
    device: str | None = None


@dataclass(frozen=True)
class _Contestant:
    """Who answers, with what it takes to describe its codes."""

    answerer: Answerer
    decode: Callable[[Sequence[int]], str]
    measure: Callable[[Mapping[str, Any]], ReferenceMeasures]


def run_evaluate(request: EvaluateRequest) -> None:
    """Check everything cheap, load the model, evaluate, write, print.

    Raises:
        UserError, RecipeError, ValueError, OSError, ImportError: naming what is missing or wrong.
    """
    no_bars_in_logs()
    recipe = None if request.recipe is None else load_recipe(request.recipe)
    place, name = _place(request)
    rewards, given = _rewards(request, recipe)
    splits = _splits(request, recipe)
    encoder = _encoder(request)
    device = torch_device(request.device)
    contestant = _contestant(request, place, name, device, (rewards, [r.weight for r in given]))
    try:
        with _progress() as on_progress:
            record = evaluate(
                contestant.answerer,
                splits,
                rewards,
                weights=[reward.weight for reward in given],
                settings=request.settings,
                encoder=encoder,
                decode=contestant.decode,
                reward_settings=[reward.settings for reward in given],
                on_progress=on_progress,
            )
    except RewardStop as stop:
        raise UserError(f"evaluate: a reward ended the run: {stop}") from stop
    measured = contestant.measure(splits)
    record = dataclasses.replace(
        record, world_model=measured.world_model, code_effects=measured.code_effects
    )
    path = request.out or request.run / DIRECTORY / f"{name.replace(' ', '-')}.json"
    save_evaluation(record, path)
    _show(record, path)


def _place(request: EvaluateRequest) -> tuple[Path, str]:
    """The checkpoint or model directory to load, and the evaluation's name."""
    if request.name is not None and not _NAME.match(request.name):
        raise UserError(
            f"evaluate: --name must be words of letters, digits, '.', '_' and '-', "
            f"got {request.name!r}"
        )
    _check_search(request)
    run = request.run
    if (run / _MODEL).is_file() and not (run / _CHECKPOINT).is_file():
        if request.base:
            raise UserError(f"evaluate: {run} is no latent-action checkpoint; leave out --base")
        return run, request.name or "token model"
    place = checkpoint_in(run)
    usual = place.name if _STEP.match(place.name) else "latent policy"
    if request.search is not None:
        usual = f"{usual} {request.search.replace(':', ' ')}"
    return place, request.name or ("base model" if request.base else usual)


def _check_search(request: EvaluateRequest) -> None:
    if request.search is None:
        return
    parse_search(request.search)
    token_model = (request.run / _MODEL).is_file() and not (request.run / _CHECKPOINT).is_file()
    if request.base or token_model:
        raise UserError("evaluate: --search searches codes, which a base or token model lacks")


def _rewards(
    request: EvaluateRequest, recipe: Recipe | None
) -> tuple[list[RewardFunction], list[RewardRecipe]]:
    if request.rewards:
        given = [_reward(text) for text in request.rewards]
        where, directory = "--reward", Path()
    elif recipe is not None and recipe.rl is not None and request.recipe is not None:
        given, where, directory = list(recipe.rl.rewards), "rl.rewards", request.recipe.parent
    else:
        raise UserError("evaluate: needs --reward, or --recipe with rl.rewards")
    return [resolve_reward(r, f"{where}[{i}]", directory) for i, r in enumerate(given)], given


def _reward(text: str) -> RewardRecipe:
    function, _, weight = text.partition("=")
    try:
        return RewardRecipe(function, float(weight) if weight else 1.0)
    except ValueError as error:
        raise UserError(f"--reward: weight must be a number, got {text!r}") from error


def _splits(request: EvaluateRequest, recipe: Recipe | None) -> dict[str, list[dict[str, Any]]]:
    known: Mapping[str, DataRecipe] = {} if recipe is None else recipe.data
    given = request.splits or tuple(f"{n}={n}" for n in _USUAL_SPLITS if n in known)
    if not given:
        raise UserError(
            "evaluate: needs --split NAME=DATA, such as --split test=prompts.jsonl "
            "(without it, data sets named test and ood of the recipe)"
        )
    splits: dict[str, list[dict[str, Any]]] = {}
    for text in given:
        name, _, data = text.partition("=")
        if not name or not data or name in splits:
            raise UserError(f"--split: must be NAME=DATA, each name once, got {text!r}")
        found = known.get(data) or DataRecipe(
            Path(data), request.format, image_root=request.image_root
        )
        limits = [limit for limit in (found.limit, request.limit) if limit is not None]
        found = dataclasses.replace(found, limit=min(limits, default=None))
        splits[name] = recipe_data.prompts(data, found)
    return splits


def _encoder(request: EvaluateRequest) -> SentenceEncoder | None:
    if request.encoder is None:
        return None
    if request.settings.samples < 2:
        raise UserError(
            "evaluate: semantic diversity needs --samples >= 2; leave it out with --no-semantic"
        )
    try:
        return load_encoder(request.encoder)
    except ImportError as error:
        raise UserError(f"{error}, or leave it out with --no-semantic") from error


def _contestant(
    request: EvaluateRequest,
    place: Path,
    name: str,
    device: torch.device,
    rewards: tuple[Sequence[RewardFunction], Sequence[float]],
) -> _Contestant:
    if not (place / _CHECKPOINT).is_file():
        processor = load_processor([request.processor or place], "processor")
        model = load_backbone(str(place), request.dtype, "evaluate").to(device)
        details = {
            "model": str(place),
            "weights": weights_fingerprint(place),
            "dtype": str(model.dtype),
        }
        tokens = TokenAnswerer(model, processor, name=name, details=details)
        return _Contestant(tokens, processor.tokenizer.decode, lambda _: ReferenceMeasures())
    config, saved = saved_latent_config(place)
    latent = load_checkpoint(place, request.backbone, request.dtype).to(device)
    base_name = request.backbone or (saved.get("base_model") or {}).get("name")
    candidates: list[str | Path] = [place, *([base_name] if base_name else [])]
    processor = load_processor(
        [request.processor] if request.processor else candidates, "processor"
    )
    details = {
        "checkpoint": str(place),
        "weights": weights_fingerprint(place),
        "latent_config": fingerprint(dataclasses.asdict(config)),
        "base_model": str(base_name),
        "dtype": str(latent.dtype),
    }
    if request.base:
        base = TokenAnswerer(latent.backbone, processor, name=name, details=details)
        return _Contestant(base, processor.tokenizer.decode, lambda _: ReferenceMeasures())
    answerer: Answerer = LatentAnswerer(latent, processor, name=name, details=details)
    if request.search is not None:
        context = SearchContext(
            latent, processor, *rewards, name=name, details={**details, "name": request.search}
        )
        answerer = search_by_name(request.search, context)
    return _Contestant(
        answerer,
        processor.tokenizer.decode,
        lambda splits: measure_references(latent, processor, splits),
    )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr where somebody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("prompts")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(record: Evaluation, path: Path) -> None:
    console = Console()
    summaries = summarise(record)
    console.print(metric_table(record.name, summaries))
    for split, found in summaries.items():
        if found.dropped:
            console.print(
                f"{split}: {found.dropped} of {found.answers} answers dropped "
                f"({found.failed} because a reward failed)",
                markup=False,
            )
    Console(soft_wrap=True).print(f"wrote {path}", markup=False)
