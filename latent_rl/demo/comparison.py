"""The last steps of the demo: both RL arms per task, evaluation, report."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from latent_rl import __version__
from latent_rl.data import ConversationCollator
from latent_rl.demo import report
from latent_rl.demo.arms import Budget, DemoJob, run_demo_arm
from latent_rl.demo.evaluate import SAMPLES, Splits, arm_result, measure_arm
from latent_rl.demo.progress import StepProgress
from latent_rl.demo.result import ArmResult, DemoResult, WorldModelNumbers, result_from_json
from latent_rl.demo.steps import LATENT, MAX_LENGTH
from latent_rl.demo.tasks import TASKS, Task
from latent_rl.demo.tiny_vlm import load_model, load_processor
from latent_rl.demo.workspace import Workspace
from latent_rl.eval import (
    Answerer,
    LatentAnswerer,
    TokenAnswerer,
    save_evaluation,
    world_model_report,
)
from latent_rl.eval.writing import write_json
from latent_rl.models import LatentActionModel
from latent_rl.train import ArmRun, LatentArm, TokenArm

__all__ = ["EvaluationStep", "LatentArmStep", "ReportStep", "TokenArmStep"]

_CLONED = "behaviour_cloning"
_PROMPTS = 96


def _budget(workspace: Workspace) -> Budget:
    scale = workspace.settings.scale
    batch = 64 if scale >= 0.5 else 16
    return Budget(steps=workspace.settings.steps(60), batch=batch)


def _job(workspace: Workspace, name: str, arm: str, progress: StepProgress) -> DemoJob:
    task = TASKS[name]
    return DemoJob(
        processor=load_processor(workspace.path("base")),
        rewards=task.rewards(),
        rows=task.prompts(workspace.path("data"), "rl"),
        budget=_budget(workspace),
        algorithm=workspace.settings.algorithm,
        seed=workspace.settings.seed,
        out=workspace.path("rl", f"{arm}-{name}"),
        progress=progress,
    )


def _record(run: ArmRun) -> dict[str, Any]:
    """What the evaluation and the report read of an arm."""
    return {
        "curve": run.curve,
        "rollout_seconds": run.spending.rollout_seconds,
        "update_seconds": run.spending.update_seconds,
        "generated_tokens": run.spending.generated_tokens,
    }


@dataclass(frozen=True)
class LatentArmStep:
    """RL of the latent policy on one task, from the cloned policy."""

    task: str
    weight: float = 20

    @property
    def name(self) -> str:
        """The arm and its task."""
        return f"latent RL, {self.task}"

    def run(self, workspace: Workspace, progress: StepProgress) -> dict[str, Any]:
        """See :class:`latent_rl.demo.steps.Step`."""
        model = _latent_model(workspace, _CLONED)
        job = _job(workspace, self.task, "latent", progress)
        run = run_demo_arm(LatentArm(lambda: model), job, job.budget.latent_rate)
        model.save_pretrained(workspace.path("latent", self.task))
        return _record(run)


@dataclass(frozen=True)
class TokenArmStep:
    """Token-level RL of the base model on one task, with TRL's GRPOTrainer."""

    task: str
    weight: float = 32

    @property
    def name(self) -> str:
        """The arm and its task."""
        return f"token RL, {self.task}"

    def run(self, workspace: Workspace, progress: StepProgress) -> dict[str, Any]:
        """See :class:`latent_rl.demo.steps.Step`."""
        model = load_model(workspace.path("base"))
        job = _job(workspace, self.task, "token", progress)
        run = run_demo_arm(TokenArm(lambda: model), job, job.budget.token_rate)
        model.save_pretrained(workspace.path("token", self.task))
        return _record(run)


@dataclass(frozen=True)
class EvaluationStep:
    """Measure every arm on held-out pictures, with known and with held-out personas."""

    name: str = "evaluation"
    weight: float = 26

    def run(self, workspace: Workspace, progress: StepProgress) -> dict[str, Any]:
        """See :class:`latent_rl.demo.steps.Step`."""
        tasks = [TASKS[name] for name in workspace.settings.tasks]
        processor = load_processor(workspace.path("base"))
        progress.start(4 * len(tasks))
        arms: list[dict[str, Any]] = []

        def on_progress(prompts: int, total: int) -> None:
            progress.advance_to(len(arms) + prompts / total)

        for task in tasks:
            splits: Splits = {
                split: task.prompts(workspace.path("data"), split)[:_PROMPTS]
                for split in ("test", "ood")
            }
            for answerer, step in _contestants(workspace, task, processor):
                record = measure_arm(
                    answerer, task.rewards(), splits, processor.tokenizer.decode, on_progress
                )
                file = f"{task.name}-{answerer.name}.json".replace(" ", "-")
                save_evaluation(record, workspace.path("evaluations", file))
                result = arm_result(answerer.name, task.name, record)
                if step is not None:
                    run = workspace.record(step)
                    result = dataclasses.replace(
                        result,
                        rollout_seconds=run["rollout_seconds"],
                        update_seconds=run["update_seconds"],
                        curve=tuple(run["curve"]),
                    )
                arms.append(dataclasses.asdict(result))
        return {"arms": arms, **_world_model(workspace, tasks)}


def _contestants(
    workspace: Workspace, task: Task, processor: Any
) -> Sequence[tuple[Answerer, str | None]]:
    """Who answers, and the RL step its seconds and curve come from."""
    base = load_model(workspace.path("base"))
    token = load_model(workspace.path("token", task.name))
    cloned, tuned = (_latent_model(workspace, name) for name in (_CLONED, task.name))
    return (
        (TokenAnswerer(base, processor, name="SFT"), None),
        (TokenAnswerer(token, processor, name="token RL"), TokenArmStep(task.name).name),
        (LatentAnswerer(cloned, processor, name="cloned policy", slots=256), None),
        (
            LatentAnswerer(tuned, processor, name="latent RL", slots=256),
            LatentArmStep(task.name).name,
        ),
    )


def _latent_model(workspace: Workspace, name: str) -> LatentActionModel:
    return LatentActionModel.from_pretrained(
        workspace.path("latent", name), load_model(workspace.path("base"))
    )


def _world_model(workspace: Workspace, tasks: Sequence[Task]) -> dict[str, Any]:
    """Cross-entropies on held-out ideal answers, and what each code speaks for."""
    model = _latent_model(workspace, _CLONED)
    processor = load_processor(workspace.path("base"))
    collator = ConversationCollator(processor, max_length=MAX_LENGTH)
    rows = [
        {
            "messages": [*row["prompt"], {"role": "assistant", "content": row["reference"]}],
            "images": row["images"],
        }
        for task in tasks
        for row in task.prompts(workspace.path("data"), "test")[:32]
    ]
    batches = [collator(rows[i : i + 16]) for i in range(0, len(rows), 16)]
    numbers = world_model_report(model, batches)
    return {
        "world_model": {
            "base": numbers.base,
            "inverse": numbers.inverse,
            "random": numbers.random,
            "marginal": numbers.marginal,
        },
        "code_tokens": _code_tokens(model, processor, batches),
    }


@torch.no_grad()
def _code_tokens(
    model: LatentActionModel, processor: Any, batches: Sequence[Any]
) -> dict[str, Any]:
    """Per code, the response tokens the inverse model most often explains by it."""
    counts = torch.zeros(LATENT.num_codes, len(processor.tokenizer), dtype=torch.int64)
    for batch in batches:
        trace = model.encode(batch["inputs"])
        codes = model.inverse_codes(model.inverse(model.state(trace), trace).head)
        acts = batch["labels"][:, 1:] != -100
        pairs = codes[:, :-1][acts], batch["labels"][:, 1:][acts]
        counts.index_put_(pairs, torch.ones_like(pairs[0]), accumulate=True)
    top = {}
    for code in counts.sum(1).nonzero()[:, 0].tolist():
        tokens = counts[code].topk(4)
        top[str(code)] = [
            processor.tokenizer.decode([token])
            for token, count in zip(tokens.indices.tolist(), tokens.values.tolist(), strict=True)
            if count
        ]
    return top


@dataclass(frozen=True)
class ReportStep:
    """Write the results, the picture and the report; the table is printed by the caller."""

    name: str = "report"
    weight: float = 2

    def run(self, workspace: Workspace, progress: StepProgress) -> dict[str, Any]:
        """See :class:`latent_rl.demo.steps.Step`."""
        result = collect(workspace)
        write_json(workspace.path("result.json"), dataclasses.asdict(result))
        report.write_picture(result, workspace.path("report.png"))
        report.write_report(result, workspace.path("report.html"))
        return {}


def collect(workspace: Workspace) -> DemoResult:
    """The result of a run whose evaluation is done."""
    evaluation = workspace.record("evaluation")
    arms: tuple[ArmResult, ...] = tuple(result_from_json(arm) for arm in evaluation["arms"])
    losses = {
        name: tuple(workspace.record(name)["losses"])
        for name in workspace.seconds()
        if "losses" in workspace.record(name)
    }
    return DemoResult(
        settings=workspace.settings.as_dict(),
        machine={
            "processor": _processor_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "latent_rl": __version__,
        },
        arms=arms,
        world_model=WorldModelNumbers(**evaluation["world_model"]),
        num_codes=LATENT.num_codes,
        step_seconds=workspace.seconds(),
        losses=losses,
        code_tokens={int(k): tuple(v) for k, v in evaluation["code_tokens"].items()},
        rl_budget=_budget(workspace).rollouts,
        evaluation_seeds=SAMPLES,
    )


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
