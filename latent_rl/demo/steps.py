"""The steps of the demo up to the cloned policy: data, base model, features, latent stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.trainer_callback import PrinterCallback

from latent_rl.data import ConversationCollator, PairedViewCollator
from latent_rl.demo.corpus import captions, exchanges, write_corpora
from latent_rl.demo.pretrain import phases_at, pretrain
from latent_rl.demo.progress import StepProgress, TrainerProgress
from latent_rl.demo.tasks import TASKS, Amounts
from latent_rl.demo.tiny_vlm import (
    TinyVlmSizes,
    build_model,
    build_processor,
    load_model,
    load_processor,
)
from latent_rl.demo.workspace import Workspace
from latent_rl.models import LatentActionModel, LatentConfig
from latent_rl.train import (
    FeatureCache,
    Stage,
    StageArguments,
    StageTrainer,
    build_feature_cache,
)

__all__ = ["LATENT", "CorporaStep", "FeatureStep", "LatentStageStep", "PretrainStep", "Step"]

# Wide enough for every row of the demo; longer exchanges are cut.
MAX_LENGTH = 112
LATENT = LatentConfig(num_codes=48, inverse_layers=1, policy_layers=2, merge_blocks=1)


class Step(Protocol):
    """A resumable part of the run."""

    @property
    def name(self) -> str:
        """Unique; the manifest's key."""
        ...

    @property
    def weight(self) -> float:
        """Expected seconds on two cores at scale 1."""
        ...

    def run(self, workspace: Workspace, progress: StepProgress) -> dict[str, Any]:
        """Do it; returns plain values for later steps and the report."""
        ...


@dataclass(frozen=True)
class CorporaStep:
    """Write scans, captions, exchanges and the tasks' dialogues in the benchmarks' formats."""

    name: str = "corpora"
    weight: float = 1

    def run(self, workspace: Workspace, progress: StepProgress) -> dict[str, Any]:
        """See :class:`Step`."""
        scale = min(1.0, workspace.settings.scale * 4)
        full = Amounts()
        amounts = Amounts(
            dialogues=max(96, round(full.dialogues * scale)),
            texts=max(48, round(full.texts * scale)),
            rl=max(32, round(full.rl * scale)),
            test=max(16, round(full.test * scale)),
        )
        write_corpora(
            workspace.path("data"), list(TASKS.values()), amounts, seed=workspace.settings.seed
        )
        return {}


@dataclass(frozen=True)
class PretrainStep:
    """Train the base model from scratch on captions, text and the tasks' uneven dialogues.

    This is pre-training and supervised fine-tuning in one; its checkpoint is what both RL arms
    start from.
    """

    name: str = "base model"
    weight: float = 103

    def run(self, workspace: Workspace, progress: StepProgress) -> dict[str, Any]:
        """See :class:`Step`."""
        settings = workspace.settings
        data = workspace.path("data")
        tasks = list(TASKS.values())
        corpora = {
            "captions": captions(data),
            "exchanges": exchanges(data),
            "texts": [row for task in tasks for row in task.texts(data)],
            "dialogues": [row for task in tasks for row in task.dialogues(data)],
        }
        sizes = TinyVlmSizes()
        processor = build_processor(_texts(row for rows in corpora.values() for row in rows), sizes)
        torch.manual_seed(settings.seed)
        model = build_model(processor, sizes)
        collator = ConversationCollator(processor, max_length=MAX_LENGTH)
        encoded = {name: collator.encode(rows) for name, rows in corpora.items()}
        phases = phases_at(settings.scale)
        progress.start(sum(phase.steps for phase in phases))
        losses = pretrain(
            model,
            processor,
            encoded,
            phases,
            settings.seed,
            lambda step, loss: progress.advance_to(step + 1, f"loss {loss:.2f}"),
        )
        model.save_pretrained(workspace.path("base"))
        processor.save_pretrained(workspace.path("base"))
        return {"losses": losses}


@dataclass(frozen=True)
class FeatureStep:
    """Run the frozen trunk once over everything the latent stages see."""

    name: str = "features"
    weight: float = 8
    rows: int = 1600

    def run(self, workspace: Workspace, progress: StepProgress) -> dict[str, Any]:
        """See :class:`Step`."""
        data = workspace.path("data")
        limit = workspace.settings.steps(self.rows, least=64)
        tasks = list(TASKS.values())
        paired = [row for task in tasks for row in task.dialogues(data)[: limit // 2]]
        text = [row for task in tasks for row in task.texts(data)[: limit // 8]]
        text += exchanges(data)[: limit // 4]
        processor = load_processor(workspace.path("base"))
        model = LatentActionModel(load_model(workspace.path("base")), LATENT)
        collator = PairedViewCollator(processor, max_length=MAX_LENGTH)
        done = 0
        progress.start(len(paired) + len(text))
        for name, rows in (("paired", paired), ("text", text)):
            before = done

            def on_batch(count: int, _: int, before: int = before) -> None:
                progress.advance_to(before + count)

            build_feature_cache(model, rows, collator, batch_size=32, progress=on_batch).save(
                workspace.path("features", name)
            )
            done += len(rows)
        return {"paired": len(paired), "text": len(text)}


@dataclass(frozen=True)
class LatentStageStep:
    """One latent stage on cached features, starting from the stage before."""

    stage: Stage
    steps: int
    weight: float
    start_from: str | None
    with_text: bool

    @property
    def name(self) -> str:
        """The stage's own name."""
        return self.stage.name

    def run(self, workspace: Workspace, progress: StepProgress) -> dict[str, Any]:
        """See :class:`Step`."""
        settings = workspace.settings
        rows = FeatureCache.load(workspace.path("features", "paired"))
        if self.with_text:
            rows = rows + FeatureCache.load(workspace.path("features", "text"))
        model = self._model(workspace)
        arguments = StageArguments(
            output_dir=str(workspace.path("stages", self.name)),
            max_steps=settings.steps(self.steps),
            per_device_train_batch_size=48,
            seed=settings.seed,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            probe=False,
        )
        trainer = StageTrainer(
            model, self.stage, arguments, rows, callbacks=[TrainerProgress(progress)]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.save_pretrained(workspace.path("latent", self.name))
        return {"losses": [log["loss"] for log in trainer.state.log_history if "loss" in log]}

    def _model(self, workspace: Workspace) -> LatentActionModel:
        backbone = load_model(workspace.path("base"))
        if self.start_from is None:
            torch.manual_seed(workspace.settings.seed)
            return LatentActionModel(backbone, LATENT)
        return LatentActionModel.from_pretrained(
            workspace.path("latent", self.start_from), backbone
        )


def _texts(rows: Iterable[dict[str, Any]]) -> list[str]:
    texts = []
    for row in rows:
        for message in row["messages"]:
            content = message["content"]
            parts: Sequence[Any] = (
                [{"type": "text", "text": content}] if isinstance(content, str) else content
            )
            texts += [part["text"] for part in parts if part["type"] == "text"]
    return texts
