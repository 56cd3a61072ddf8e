"""One iteration of latent RL on a small model under torch's profiler.

``python -m benchmarks timeline`` writes a chrome trace (for Perfetto or chrome://tracing), a
picture and a table of the phases and the ops in them.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from benchmarks.trace import ITERATION, PREFIX
from latent_rl.demo.tiny_vlm import TinyVlmSizes, build_model, build_processor
from latent_rl.models import LatentActionModel, LatentConfig
from latent_rl.train import LatentGRPOConfig, LatentGRPOTrainer

QUESTION = "what is written in the picture ? say it in your own words , as a friend would ."


@dataclass(frozen=True)
class Sizes:
    """A model of ``layers`` of width ``hidden``, and a rollout of ``prompts`` x ``group``
    completions of ``steps`` tokens; ``warm_up`` iterations pass before the one that is recorded."""

    hidden: int = 256
    layers: int = 6
    policy_layers: int = 2
    prompts: int = 8
    group: int = 8
    steps: int = 64
    warm_up: int = 2

    def __str__(self) -> str:
        return (
            f"One iteration of latent GRPO, {self.prompts} prompts x {self.group} completions of "
            f"{self.steps} tokens, {self.layers} layers of width {self.hidden} and a policy of "
            f"{self.policy_layers},"
        )


class Recorder(TrainerCallback):
    """Profiles the optimizer step number ``at`` (from 0), rollout included."""

    def __init__(self, at: int, device: torch.device, path: Path) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._at, self._device, self._path = at, device, path
        self._profiler = profile(activities=activities)
        self._iteration: Any = record_function(PREFIX + ITERATION)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start before the step that is asked for."""
        if state.global_step == self._at:
            self._wait()
            self._profiler.__enter__()
            self._iteration.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after it, and write the trace."""
        if state.global_step == self._at + 1:
            self._wait()
            self._iteration.__exit__(None, None, None)
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(str(self._path))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def some_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that differs within groups."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def prompts_of(count: int) -> list[dict[str, Any]]:
    """Rows with an image each."""
    from PIL import Image

    pixels = torch.randint(256, (count, 16, 16, 3), generator=torch.Generator().manual_seed(0))
    return [
        {
            "prompt": [{"role": "user", "content": QUESTION}],
            "images": [Image.fromarray(image.byte().numpy())],
        }
        for image in pixels
    ]


def record(sizes: Sizes, device: torch.device, path: Path) -> None:
    """Train for one iteration more than the warm-up and write that one's trace to ``path``."""
    torch.manual_seed(0)
    model_sizes = TinyVlmSizes(hidden=sizes.hidden, layers=sizes.layers)
    processor = build_processor([QUESTION] * 3, model_sizes)
    backbone = build_model(processor, model_sizes).eval()
    config = LatentConfig(num_codes=64, inverse_layers=1, policy_layers=sizes.policy_layers)
    model = LatentActionModel(backbone, config)
    for block in model.latent.merge.blocks:
        torch.nn.init.normal_(block.w_down, std=0.3)
    rows = sizes.prompts * sizes.group
    with tempfile.TemporaryDirectory() as folder:
        args = LatentGRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=max(sizes.group, rows // 4),
            gradient_accumulation_steps=rows // max(sizes.group, rows // 4),
            num_generations=sizes.group,
            max_completion_length=sizes.steps,
            max_steps=sizes.warm_up + 1,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
            # Every completion runs to its last step: the same work whatever the weights.
            generation_kwargs={"min_new_tokens": sizes.steps},
        )
        model.to(device)
        trainer = LatentGRPOTrainer(
            model,
            some_reward,
            args,
            prompts_of(sizes.prompts),
            processing_class=processor,
            callbacks=[Recorder(sizes.warm_up, device, path)],
        )
        trainer.train()
