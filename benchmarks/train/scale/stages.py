"""Steps of the training stages at given shapes: time and peak memory against the paper's form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train.scale.clocks import free, middle, peak_memory, repeated_ms
from benchmarks.train.scale.paper_stages import paper_form
from benchmarks.train.scale.record import AbsentError, Record, Row
from benchmarks.train.scale.sizes import ScaleSizes, build_model, random_pictures, random_text
from latent_rl.models import LatentActionModel
from latent_rl.train.features import trace_of, view_states
from latent_rl.train.freezing import freeze, set_training_modes
from latent_rl.train.stages import (
    BehaviourCloning,
    InverseWarmup,
    Joint,
    ProjectorWarmup,
    Stage,
    TaskSFT,
)
from latent_rl.train.token_loss import IGNORE_INDEX

OURS, CACHED, PAPER = "ours", "ours, cached states", "the paper's form"


@dataclass(frozen=True)
class StagesPlanned:
    """What to measure.

    Attributes:
        rows: sequences of a batch; in ``Joint`` half of them have no image.
        length: L, tokens of each, image included; none is padded.
        response: tokens of each that are a response.
        sft_layers: backbone layers that ``TaskSFT`` trains.
        repeats: timed steps, after one that does not count.
    """

    rows: int = 4
    length: int = 2048
    response: int = 1024
    sft_layers: int = 4
    repeats: int = 5

    def as_dict(self) -> dict[str, int]:
        """Of the record."""
        return asdict(self)

    def stages(self) -> list[Stage]:
        """Joint first: it has numbers to reach."""
        return [
            Joint(),
            InverseWarmup(),
            ProjectorWarmup(),
            BehaviourCloning(),
            TaskSFT(backbone_layers=self.sft_layers),
        ]


class StagesBench:
    """Batches, and a model with float32 latent modules, under autocast if the backbone is not."""

    def __init__(self, sizes: ScaleSizes, planned: StagesPlanned, record: Record) -> None:
        """Make the model; the codebook is placed by the first batch, as a run does."""
        self.sizes, self.planned, self.record = sizes, planned, record
        self.device = record.device
        self.model: LatentActionModel = build_model(
            sizes, self.device, record.dtype, latent_dtype="float32"
        )
        with self.autocast():
            InverseWarmup().prepare(self.model, [self.batch(InverseWarmup())])

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """As ``bf16=True`` of the trainers, where the backbone is bfloat16."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.record.autocasts):
            yield

    def measure(self) -> None:
        """Every row that is not there yet."""
        for stage in self.planned.stages():
            case = {"stage": stage.name, **self.planned.as_dict()}
            for name, measure in (
                (OURS, lambda stage=stage: self._ours(stage)),
                (CACHED, lambda stage=stage: self._cached(stage)),
                (PAPER, lambda stage=stage: self._paper(stage)),
            ):
                self.record.add(case, name, measure)
                self.model.zero_grad(set_to_none=True)
                free(self.device)

    def batch(self, stage: Stage) -> dict[str, Any]:
        """Rows with images; for ``Joint`` half of them are of text alone."""
        planned, device = self.planned, self.device
        text_rows = planned.rows // 2 if isinstance(stage, Joint) else 0
        paired = planned.rows - text_rows
        inputs = random_pictures(self.sizes, paired, planned.length, device)
        if text_rows:
            text = random_text(self.sizes, text_rows, planned.length, device, seed=1)
            text["mm_token_type_ids"] = torch.zeros_like(text["input_ids"])
            inputs |= {name: torch.cat([inputs[name], value]) for name, value in text.items()}
        labels = inputs["input_ids"].clone()
        labels[:, : -planned.response] = IGNORE_INDEX
        found: dict[str, Any] = {"inputs": inputs, "labels": labels}
        if stage.paired_views:
            found["text_view"] = self._view(inputs, paired)
        return found

    def _view(self, inputs: Mapping[str, Tensor], paired: int) -> dict[str, Any]:
        """The paired rows without their images: the same text, at other positions."""
        first = self.sizes.image_tokens + 2
        ids = inputs["input_ids"][:paired, first:]
        text = torch.arange(ids.shape[1], device=self.device).expand(paired, -1)
        return {
            "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            "rows": torch.arange(paired, device=self.device),
            "image_positions": text + first,
            "text_positions": text,
            "keep_mask": torch.ones_like(ids, dtype=torch.bool),
        }

    def _ours(self, stage: Stage) -> Row:
        batch = self.batch(stage)
        return self._steps(stage, lambda: stage.loss(self.model, batch).loss)

    def _cached(self, stage: Stage) -> Row:
        """With the trunk's states of a feature cache, already on the device."""
        if not stage.cacheable:
            raise AbsentError("the stage trains the backbone: no states can be kept")
        batch = self.batch(stage)
        with self.autocast():
            known = {"trace": trace_of(self.model, batch), "labels": batch["labels"]}
            if "text_view" in batch:
                view = batch["text_view"]
                known["text_view"] = {**view, "hidden": view_states(self.model, view)}
        return self._steps(stage, lambda: stage.loss(self.model, known).loss)

    def _paper(self, stage: Stage) -> Row:
        batch, loss = self.batch(stage), paper_form(stage)
        return self._steps(stage, lambda: loss(self.model, batch))

    def _steps(self, stage: Stage, loss: Callable[[], Tensor]) -> Row:
        """Whole steps: loss, backward, clipping, AdamW."""
        model, trainable = self.model, stage.trainable(self.model)
        freeze(model, trainable)
        set_training_modes(model, trainable)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=self.device.type == "cuda")
        losses: list[Tensor] = []

        def step() -> None:
            with self.autocast():
                found = loss()
            found.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(found.detach())

        step()
        with peak_memory(self.device) as memory:
            times = repeated_ms(step, self.device, self.planned.repeats)
        row = {
            "step_ms": middle(times),
            "steps_ms": times,
            "first_loss": float(losses[0]),
            "trained_parameters": sum(p.numel() for p in weights),
            "tokens_per_s": 1e3 * self.planned.rows * self.planned.length / middle(times),
            **asdict(memory),
        }
        peak = "" if memory.peak_bytes is None else f", peak {memory.peak_bytes / 2**30:.1f} GiB"
        row["summary"] = f"{row['step_ms']:.1f} ms{peak}"
        return row


def headings() -> tuple[str, ...]:
    """Of the table."""
    return ("stage", "contestant", "ms/step", "tokens/s", "peak GiB", "times ours",
            "peak, times ours")  # fmt: skip


def lines(record: Record) -> list[Sequence[str]]:
    """Of the table."""
    found: list[Sequence[str]] = []
    for row in record.rows:
        stage, name = row["case"]["stage"], row["contestant"]
        if row["status"] != "measured":
            found.append((stage, name, row["status"], "", "", "", ""))
            continue
        ours = record.find(row["case"], OURS)
        peak = row["peak_bytes"]
        slower = memory = ""
        if ours is not None:
            slower = f"{row['step_ms'] / ours['step_ms']:.2f}x"
            memory = "" if peak is None else f"{peak / ours['peak_bytes']:.2f}x"
        gib = "" if peak is None else f"{peak / 2**30:.1f}"
        found.append(
            (stage, name, f"{row['step_ms']:.1f}", f"{row['tokens_per_s']:.0f}", gib, slower,
             memory)
        )  # fmt: skip
    return found


def draw(record: Record, axes: Any) -> None:
    """Time of a step, and peak memory where it is known."""
    stages = list(dict.fromkeys(row["case"]["stage"] for row in record.rows))
    names = (OURS, CACHED, PAPER)
    shown = (("step_ms", 1.0, "milliseconds per step"), ("peak_bytes", 2**30, "peak GiB"))
    for axis, (field, unit, label) in zip(axes, shown, strict=False):
        for at, name in enumerate(names):
            rows = [r for r in record.rows if r["contestant"] == name and r.get(field) is not None]
            places = [stages.index(r["case"]["stage"]) + (at - 1) * 0.27 for r in rows]
            axis.barh(places, [r[field] / unit for r in rows], height=0.25, label=name)
        axis.set_yticks(range(len(stages)), stages)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3, axis="x")
    axes[0].legend(fontsize=7)
