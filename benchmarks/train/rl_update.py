"""One RL update on a fixed rollout: replay against recomputing the trunk, and against TRL.

``python -m benchmarks.train.rl_update`` prints the table and writes JSON into
``benchmarks/results/train/``. An update is all micro-batches of a rollout, forward and backward,
reference included, then one clipped step of the optimizer. Contestants get the same rows, tokens
and number of steps, and take turns; a row is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import describe
from latent_rl.decode.prompts import split_prompts
from latent_rl.demo.tiny_vlm import TinyVlmSizes, build_model, build_processor
from latent_rl.models import LatentActionModel, LatentConfig
from latent_rl.models import backbone as bb
from latent_rl.train import LatentGRPOConfig, LatentGRPOTrainer
from latent_rl.train.replay import LAYOUTS, ActionOutputs, Replay, ReplayBatch, ReplayStates
from latent_rl.train.replay.stores import GroupRecipe
from latent_rl.train.scoring import score_update
from latent_rl.train.token_trainer import token_trainer

RESULTS = Path(__file__).resolve().parents[1] / "results" / "train"
OURS, PADDED = "replay, packed", "replay, padded"
RECOMPUTED, TRUNK = "states recomputed, packed", "the paper's form"
TOKENS = "TRL, token level"
QUESTION = "what is written in the picture ? say it in your own words , as a friend would ."


@dataclass(frozen=True)
class Case:
    """A model of ``layers`` of width ``hidden`` with a policy of ``policy_layers``, and a rollout
    of ``prompts`` x ``group`` completions of at most ``steps`` tokens; ``words`` lengthens the
    prompt, ``micro`` is the micro-batch."""

    name: str
    hidden: int
    layers: int
    policy_layers: int
    vocabulary: int
    prompts: int
    group: int
    steps: int
    words: int = 1
    micro: int = 8


CASES = (
    Case("demo", 96, 3, 2, 1024, 8, 8, 64, words=2),
    Case("demo, long prompt", 96, 3, 2, 1024, 8, 8, 64, words=8),
    Case("hidden 256", 256, 8, 2, 8192, 4, 8, 64, words=4),
    Case("hidden 512", 512, 12, 3, 32768, 2, 8, 48, words=4),
)


class Bench:
    """A case's model, its rollout, and the updates."""

    def __init__(self, case: Case, folder: Path) -> None:
        torch.manual_seed(0)
        self.case = case
        sizes = TinyVlmSizes(hidden=case.hidden, layers=case.layers)
        processor = build_processor([QUESTION] * 3, sizes)
        backbone = build_model(processor, sizes).eval()
        backbone.resize_token_embeddings(case.vocabulary)
        config = LatentConfig(num_codes=48, inverse_layers=1, policy_layers=case.policy_layers)
        self.model = LatentActionModel(backbone, config)
        for block in self.model.latent.merge.blocks:
            torch.nn.init.normal_(block.w_down, std=0.3)
        torch.nn.init.normal_(self.model.latent.policy.head.weight, std=0.3)
        rows = self._rows()
        micro_steps = case.prompts * case.group // case.micro
        self.args = LatentGRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=case.micro,
            gradient_accumulation_steps=micro_steps,
            num_generations=case.group,
            max_completion_length=case.steps,
            max_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            # Ends at random steps, as in training: about one token in 32.
            generation_kwargs={"eos_token_id": list(range(0, case.vocabulary, 32))},
        )
        self.reward = Reward()
        self.trainer = LatentGRPOTrainer(
            self.model, self.reward, self.args, rows, processing_class=processor
        )
        numbers = [row for row in range(case.prompts) for _ in range(case.group)]
        self.replay: Replay = self.trainer._new_replay(numbers, 0)
        self.inputs = self.trainer.worker.maker._render(rows, self.model.device)
        self.optimizer = self.trainer.create_optimizer()
        # TRL trains the whole model, so it gets one of its own.
        whole = build_model(processor, sizes).eval()
        whole.resize_token_embeddings(case.vocabulary)
        whole.load_state_dict(backbone.state_dict())
        self.tokens = token_trainer(whole, self.reward, self.args, rows, None, processor)
        self.token_optimizer = self.tokens.create_optimizer()
        self.completions = self._completions()
        # Rows by themselves, for the update that makes its own states.
        first = self.replay.batch([0])
        self.rows: ReplayBatch = replace(first, **self.replay.row_tensors())

    def _rows(self) -> list[dict[str, Any]]:
        from PIL import Image

        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (self.case.prompts, 16, 16, 3), generator=generator)
        text = " ".join([QUESTION] * self.case.words)
        return [
            {
                "prompt": [{"role": "user", "content": text}],
                "images": [Image.fromarray(image.byte().numpy())],
            }
            for image in pixels
        ]

    def _completions(self) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, T] of the rollout."""
        mask = self.replay.codes >= 0
        ids = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
        for row, said in zip(ids, self.reward.said, strict=True):
            row[: len(said)] = torch.tensor(said)
        return ids, mask

    def recipes(self) -> ReplayStates:
        """The rollout's prompts and completions in the place of their states."""
        ids, mask = self.completions
        size = self.case.group
        tokens = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        prompts = split_prompts(self.model.config, self.inputs)
        groups = [
            GroupRecipe(prompt, tuple(tokens[at * size : (at + 1) * size]))
            for at, prompt in enumerate(prompts)
        ]
        return ReplayStates.of(groups, self.model)

    def update(self, replay: Replay) -> float:
        """Update the policy on a replay."""
        trainer, steps = self.trainer, self.args.gradient_accumulation_steps
        for step in range(steps):
            batch = trainer._scorer().when_used(trainer._feed.take(replay, step))
            loss = trainer.compute_loss(trainer.model, batch) / steps
            loss.backward()
        trainer.averages.flush()
        return _finish(self.optimizer, self.model.latent.policy)

    def trunk_update(self) -> float:
        """The same update as the paper's code makes it: at every micro-step the vision tower and
        the decoder run over padded rows, then policy and reference over all their positions."""
        case, trainer = self.case, self.trainer
        steps, policy = self.args.gradient_accumulation_steps, self.model.latent.policy
        ids, mask = self.completions
        for step in range(steps):
            rows = torch.arange(step * case.micro, (step + 1) * case.micro)
            inputs = self._prompts(rows)
            first, last = inputs["input_ids"].shape[1] - 1, ids.shape[1] - 1
            whole = bb.extend_inputs(inputs, ids[rows][:, :last], mask[rows][:, :last])
            trace = self.model.encode(whole)
            state = self.model.state(trace).detach()
            batch = replace(self.rows, **{n: t[rows] for n, t in self.rows.row_tensors().items()})
            with torch.no_grad():
                reference = trainer.reference(state, trace.tower_kwargs)[:, first:]
            logits = policy(state, trace.tower_kwargs)[:, first:]
            terms, _ = score_update(
                ActionOutputs(logits, None),
                replace(batch, ref_logits=reference),
                self.args.distribution(),
            )
            loss = self.args.algorithm().loss(
                terms,
                settings=self.args.loss_settings(self.args.beta),
                normaliser=trainer._normaliser,
            )
            (loss.loss / steps).backward()
        return _finish(self.optimizer, policy)

    def _prompts(self, rows: Tensor) -> dict[str, Tensor]:
        """The processor's tensors of the prompts of some completions, images among them."""
        case = self.case
        prompts = rows // case.group
        patches = len(self.inputs["pixel_values"]) // case.prompts
        pixels = self.inputs["pixel_values"].unflatten(0, (case.prompts, patches))
        per_prompt = {n: v[prompts] for n, v in self.inputs.items() if len(v) == case.prompts}
        return {**per_prompt, "pixel_values": pixels[prompts].flatten(0, 1)}

    def token_update(self) -> float:
        """TRL's loss on the same rows and tokens, reference included, over the whole model."""
        trainer, steps = self.tokens, self.args.gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = steps
        trainer.model.train()
        for step in range(steps):
            inputs = self._token_inputs(step)
            # It divides by the number of micro-steps itself.
            trainer._compute_loss(trainer.model, inputs).backward()
        trainer._metrics["train"].clear()
        return _finish(self.token_optimizer, trainer.model)

    def _token_inputs(self, step: int) -> dict[str, Any]:
        """A micro-batch as TRL's collation cuts it, the reference's log-probabilities among it."""
        case, (ids, mask) = self.case, self.completions
        rows = torch.arange(step * case.micro, (step + 1) * case.micro)
        taken = self._prompts(rows)
        types = taken["mm_token_type_ids"]
        images = {
            "pixel_values": taken["pixel_values"],
            "image_grid_thw": taken["image_grid_thw"],
            "num_images": [1] * case.micro,
            "mm_token_type_ids": torch.cat([types, types.new_zeros(ids[rows].shape)], 1),
        }
        whole = torch.cat([taken["input_ids"], ids[rows]], 1)
        seen = torch.cat([taken["attention_mask"], mask[rows].long()], 1)
        with torch.no_grad():
            reference, _, _ = self.tokens._get_per_token_logps_and_entropies(
                self.tokens.ref_model, whole, seen, ids.shape[1], **images
            )
        return {
            "prompt_ids": taken["input_ids"],
            "prompt_mask": taken["attention_mask"],
            "completion_ids": ids[rows],
            "completion_mask": mask[rows].long(),
            "advantages": self.replay.advantages[rows],
            "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
            **images,
        }

    def contestants(self) -> dict[str, Callable[[], float]]:
        """Every way to make the update."""
        padded = replace(self.replay, layout=LAYOUTS["padded"])
        recomputed = replace(self.replay, states=self.recipes())
        return {
            OURS: lambda: self.update(self.replay),
            PADDED: lambda: self.update(padded),
            RECOMPUTED: lambda: self.update(recomputed),
            TRUNK: self.trunk_update,
            TOKENS: self.token_update,
        }


class Reward:
    """Some reward that differs within groups; remembers what was said."""

    __name__ = "some_reward"

    def __init__(self) -> None:
        self.said: list[list[int]] = []

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """See :class:`latent_rl.rewards.RewardFunction`."""
        self.said = completion_ids
        return [float(sum(ids) % 7) for ids in completion_ids]


def _finish(optimizer: torch.optim.Optimizer, module: nn.Module) -> float:
    """One step of the optimizer; the gradient's norm."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def measure(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of each contestant over interleaved rounds, after a round that does not count.

    The norms of that round's gradients say whether the latent contestants do the same work: the
    learning rate is too small for one update to be seen in the next.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    norms = {name: call() for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {
        name: {"median_s": statistics.median(t), "rounds_s": t, "gradient_norm": norms[name]}
        for name, t in times.items()
    }


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(case, Path(folder))
        times = measure(bench.contestants(), rounds)
    model, mask = bench.model, bench.completions[1]
    row = {
        "case": asdict(case),
        "prompt_tokens": int(bench.inputs["input_ids"].shape[1]),
        "mean_length": float(mask.sum(1).float().mean()),
        "longest": mask.shape[1],
        "dtype": str(model.dtype),
        "backbone_parameters": sum(p.numel() for p in model.backbone.parameters()),
        "policy_parameters": sum(p.numel() for p in model.latent.policy.parameters()),
        "times": times,
    }
    print(case.name, {n: round(t["median_s"], 3) for n, t in times.items()}, flush=True)
    return row


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Milliseconds of ours, and how many times longer the others take."""
    table = Table(title="time of an update; others as multiples of replay, packed")
    for name in (
        "case",
        "rows",
        "prompt",
        "length",
        f"{OURS} ms",
        PADDED,
        RECOMPUTED,
        TRUNK,
        TOKENS,
    ):
        table.add_column(name)
    for row in rows:
        case, times = row["case"], row["times"]
        ours = times[OURS]["median_s"]
        table.add_row(
            case["name"],
            f"{case['prompts']} x {case['group']}",
            str(row["prompt_tokens"]),
            f"{row['mean_length']:.0f} of {row['longest']}",
            f"{1e3 * ours:.0f}",
            *(f"{times[n]['median_s'] / ours:.2f}" for n in (PADDED, RECOMPUTED, TRUNK, TOKENS)),
        )
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", help="names; default all")
    parser.add_argument("--label", default="", help="name of the machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    rows = [
        run_case(case, args.rounds) for case in CASES if not args.cases or case.name in args.cases
    ]
    Console(width=150).print(table_of(rows))
    machine = describe(torch.device("cpu"), args.label)
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine.as_dict(),
        "threads": args.threads,
        # Above the number of threads the machine was not idle, and absolute times mean little.
        "load_before": load,
        "rows": rows,
    }
    path = RESULTS / f"rl_update-{machine.slug}-{args.threads}t.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
