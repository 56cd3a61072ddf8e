"""The demo from end to end: every step in order, resumed where it was interrupted."""

from __future__ import annotations

import time

import torch
from rich.console import Console

from latent_rl.demo import report
from latent_rl.demo.comparison import (
    EvaluationStep,
    LatentArmStep,
    ReportStep,
    TokenArmStep,
    collect,
)
from latent_rl.demo.progress import DemoProgress, quiet_libraries
from latent_rl.demo.result import DemoResult
from latent_rl.demo.settings import DemoSettings
from latent_rl.demo.steps import (
    CorporaStep,
    FeatureStep,
    LatentStageStep,
    PretrainStep,
    Step,
)
from latent_rl.demo.workspace import Workspace
from latent_rl.train import BehaviourCloning, InverseWarmup, Joint, ProjectorWarmup

__all__ = ["run", "steps_of"]


def steps_of(settings: DemoSettings) -> list[Step]:
    """The steps of a run. Learning rates suit a model of a million parameters, not the paper's."""
    inverse = InverseWarmup(learning_rate=2e-3)
    projector = ProjectorWarmup(learning_rate=2e-3)
    joint = Joint(learning_rate=1e-3)
    cloning = BehaviourCloning(learning_rate=2e-3)
    steps: list[Step] = [
        CorporaStep(),
        PretrainStep(),
        FeatureStep(),
        LatentStageStep(inverse, 200, 9, start_from=None, with_text=False),
        LatentStageStep(projector, 80, 2, start_from=inverse.name, with_text=False),
        LatentStageStep(joint, 120, 7, start_from=projector.name, with_text=True),
        LatentStageStep(cloning, 300, 22, start_from=joint.name, with_text=True),
    ]
    for task in settings.tasks:
        steps += [LatentArmStep(task), TokenArmStep(task)]
    return [*steps, EvaluationStep(), ReportStep()]


def _console() -> Console:
    """Standard output; without a terminal wide enough for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def run(settings: DemoSettings, console: Console | None = None) -> DemoResult:
    """Run the demo, or what is left of it, and print the table.

    Args:
        settings: what to run and where.
        console: where progress and table go; standard output by default.

    Returns:
        The result, also written as result.json, report.png and report.html in ``settings.out``.

    Raises:
        ValueError: when ``settings.out`` holds something else, see :class:`Workspace`.
    """
    console = console or _console()
    workspace = Workspace(settings)
    steps = steps_of(settings)
    torch.manual_seed(settings.seed)
    weights = {step.name: step.weight for step in steps}
    with quiet_libraries(), DemoProgress(weights, console) as progress:
        for step in steps:
            if workspace.is_done(step.name):
                progress.skip(step.name)
                continue
            started = time.monotonic()
            with progress.step(step.name) as bar:
                record = step.run(workspace, bar)
            workspace.finish(step.name, {**record, "seconds": time.monotonic() - started})
    result = collect(workspace)
    console.print(report.table(result))
    console.print(f"report: {workspace.path('report.html')}", highlight=False, soft_wrap=True)
    return result
