"""One whole RL iteration at given shapes: what its parts take, and what others take for them."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import latent_rl.decode.run as engine
from benchmarks.train.rl_update import Bench, Reward
from benchmarks.train.scale.clocks import Spans, free, middle, peak_memory, repeated_ms
from benchmarks.train.scale.contestants import loop_times, loops
from benchmarks.train.scale.record import AbsentError, Record, Row
from benchmarks.train.scale.sizes import ScaleSizes, build_model, random_pictures
from benchmarks.train.scale.token_level import TokenGrpo, TokenRollout
from latent_rl.train import LatentGRPOConfig, LatentGRPOTrainer
from latent_rl.train.replay import LAYOUTS, Replay

ROLLOUT = "latent RL, rollout"
UPDATE, PADDED = "latent RL, update", "latent RL, update on padded rows"
TRUNK = "the paper's form, update"
TOKENS, TRL = "token level, update", "token level, update by TRL"


@dataclass(frozen=True)
class IterationCase:
    """A rollout and how its updates are cut.

    Attributes:
        prompts, group: P prompts, each with an image, and G completions of each.
        prompt_tokens: of each prompt, the image's among them.
        steps: tokens of every completion: none ends before.
        micro: completions of a micro-batch of latent updates.
        token_micro: of a micro-batch of token-level updates.
        repeats: timed rollouts and updates, after one that does not count.
        loop_repeats: timed rollouts of the others, which take a minute.
    """

    prompts: int = 8
    group: int = 8
    prompt_tokens: int = 512
    steps: int = 1024
    micro: int = 16
    token_micro: int = 4
    repeats: int = 2
    loop_repeats: int = 1

    def as_dict(self) -> dict[str, int]:
        """Of the record."""
        return asdict(self)

    @property
    def rows(self) -> int:
        """Completions."""
        return self.prompts * self.group


class Words:
    """In the place of a tokenizer: random weights say nothing that could be read."""

    chat_template = "none"

    def batch_decode(self, ids: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Numbers."""
        return [" ".join(map(str, row)) for row in ids]


class IterationBench(Bench):
    """The trainer, as a user would make it, on a model with float32 latent modules.

    Where the backbone is bfloat16 everything runs under autocast (``bf16=True``).
    """

    def __init__(self, sizes: ScaleSizes, case: IterationCase, record: Record, folder: str) -> None:
        """Make model, trainer and optimizer; nothing is rolled out."""
        self.case: Any = case
        self.device = device = record.device
        self.model = build_model(sizes, device, record.dtype, latent_dtype="float32")
        self.inputs = random_pictures(sizes, case.prompts, case.prompt_tokens, device)
        self.args = LatentGRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=case.micro,
            gradient_accumulation_steps=case.rows // case.micro,
            num_generations=case.group,
            max_completion_length=case.steps,
            max_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            bf16=record.autocasts,
        )
        self.reward = Reward()
        rows = [{"prompt": "", "number": number} for number in range(case.prompts)]
        self.trainer = LatentGRPOTrainer(
            self.model,
            self.reward,
            self.args,
            rows,
            processing_class=Words(),
            prompt_renderer=self._render,
        )
        self.optimizer = self.trainer.create_optimizer()
        self._rollouts = 0

    def _render(self, words: Any, rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        return self._prompts_of(torch.tensor([row["number"] for row in rows]))

    def _prompts_of(self, numbers: Tensor) -> dict[str, Tensor]:
        """The tensors of some prompts, images among them."""
        case, inputs = self.case, self.inputs
        patches = len(inputs["pixel_values"]) // case.prompts
        pixels = inputs["pixel_values"].unflatten(0, (case.prompts, patches))
        per_prompt = {n: v[numbers] for n, v in inputs.items() if n != "pixel_values"}
        return {**per_prompt, "pixel_values": pixels[numbers].flatten(0, 1)}

    def _prompts(self, rows: Tensor) -> dict[str, Tensor]:
        return self._prompts_of(rows // self.case.group)

    @property
    def repeated(self) -> dict[str, Tensor]:
        """Every completion's prompt."""
        return self._prompts(torch.arange(self.case.rows))

    def roll_out(self) -> tuple[Replay, dict[str, float]]:
        """A scored rollout with its states, and seconds by part."""
        trainer, spans = self.trainer, Spans(self.device)
        numbers = [row for row in range(self.case.prompts) for _ in range(self.case.group)]
        with (
            spans.around(engine, "prefill", "prefill_s"),
            spans.around(trainer.worker.maker, "make", "generation_s"),
            spans.around(trainer.worker, "_score", "reward_s"),
            spans.span("rollout_s"),
        ):
            replay = trainer._new_replay(numbers, self._rollouts)
        self._rollouts += 1
        found = spans.seconds
        found["decode_s"] = found["generation_s"] - found["prefill_s"]
        found["keep_s"] = found["rollout_s"] - found["generation_s"] - found["reward_s"]
        return replay, found

    def take(self, replay: Replay) -> None:
        """Let the updates be of this rollout."""
        self.replay = replay
        self.completions = self._completions()
        self.rows = replace(replay.batch([0]), **replay.row_tensors())

    def trunk_update(self) -> float:
        """As the parent's, under the trainer's autocast."""
        with self.trainer.accelerator.autocast():
            return super().trunk_update()

    def token_rollout(self) -> TokenRollout:
        """The same tokens and advantages for updates over tokens."""
        ids, mask = self.completions
        patches = len(self.inputs["pixel_values"]) // self.case.prompts
        return TokenRollout(self.repeated, ids, mask, self.replay.advantages, patches)


class IterationRun:
    """The rows of one case."""

    def __init__(self, sizes: ScaleSizes, case: IterationCase, record: Record) -> None:
        """Nothing is made yet."""
        self.sizes, self.case, self.record = sizes, case, record
        self.device = record.device

    def measure(self) -> None:
        """Every row that is not there yet; the token-level ones without the latent modules."""
        with tempfile.TemporaryDirectory() as folder:
            bench = IterationBench(self.sizes, self.case, self.record, folder)
            backbone, tokens = bench.model.backbone, self._latent(bench)
            beta = bench.args.beta
            del bench
        # Trainers hold themselves in cycles.
        gc.collect()
        free(self.device)
        self._add(TRL, _trl)
        self._add(TOKENS, lambda: self._token_update(backbone, tokens, beta))

    def _add(self, name: str, measure: Callable[[], Row]) -> None:
        self.record.add(self.case.as_dict(), name, measure)

    def _latent(self, bench: IterationBench) -> TokenRollout:
        """Rollouts and latent updates; returns the first rollout's tokens."""
        # The captures of the first are not of interest; its tokens are everyone's.
        with peak_memory(self.device):
            replay, first = bench.roll_out()
        bench.take(replay)
        tokens = bench.token_rollout()
        padded = replace(replay, layout=LAYOUTS["padded"])
        self._add(ROLLOUT, lambda: self._rollout(bench, first))
        for name, update in (
            (UPDATE, lambda: bench.update(replay)),
            (PADDED, lambda: bench.update(padded)),
            (TRUNK, bench.trunk_update),
        ):
            self._add(name, lambda update=update: self._update(update))
        bench.optimizer.zero_grad()
        for name, loop in loops(bench.model).items():
            self._add(
                f"rollout by {name}",
                lambda loop=loop: self._loop(bench, lambda: loop(bench.repeated, self.case.steps)),
            )
        return tokens

    def _rollout(self, bench: IterationBench, first: dict[str, float]) -> Row:
        with peak_memory(self.device) as memory:
            found = [bench.roll_out()[1] for _ in range(self.case.repeats)]
        row: Row = {name: middle([seconds[name] for seconds in found]) for name in found[0]}
        row |= asdict(memory)
        row["step_ms"] = 1e3 * row["decode_s"] / self.case.steps
        # Captures and, where it is asked for, compilation.
        row["first_rollout_s"] = first["rollout_s"]
        row["summary"] = ", ".join(
            f"{name.removesuffix('_s')} {row[name]:.3f} s"
            for name in ("prefill_s", "decode_s", "reward_s", "keep_s")
        )
        return row

    def _update(self, update: Callable[[], float]) -> Row:
        norm = update()
        with peak_memory(self.device) as memory:
            times = repeated_ms(update, self.device, self.case.repeats)
        return {
            "update_s": middle(times) / 1e3,
            "updates_s": [ms / 1e3 for ms in times],
            "gradient_norm": norm,
            **asdict(memory),
            "summary": f"{middle(times) / 1e3:.3f} s",
        }

    def _loop(self, bench: IterationBench, loop: Callable[[], Any]) -> Row:
        with peak_memory(self.device) as memory, bench.trainer.accelerator.autocast():
            times = [loop_times(bench.model, loop) for _ in range(self.case.loop_repeats)]
        prefill = middle([found.prefill_ms for found in times]) / 1e3
        decode = middle([found.steps_ms for found in times]) / 1e3
        return {
            "prefill_s": prefill,
            "decode_s": decode,
            "generation_s": prefill + decode,
            "step_ms": middle([found.step_ms for found in times]),
            **asdict(memory),
            "summary": f"prefill {prefill:.3f} s, decode {decode:.3f} s",
        }

    def _token_update(self, backbone: Any, tokens: TokenRollout, beta: float) -> Row:
        updates = TokenGrpo(backbone, tokens, micro=self.case.token_micro, beta=beta)
        return self._update(updates.update)


def _trl() -> Row:
    if importlib.util.find_spec("trl") is None:
        raise AbsentError("trl is not installed")
    raise AbsentError(
        "TRL's trainer renders prompts by a processor, which these shapes have none of; "
        "benchmarks.train.rl_update measures it, and the tests hold the row above against it"
    )


def totals(record: Record, case: Row) -> dict[str, dict[str, float]]:
    """Seconds of whole iterations by part, for every pair of rollout and update measured.

    Rewards and what is kept for updates are taken from our own rollout: they are the same for all.
    """
    ours = record.find(case, ROLLOUT)
    if ours is None:
        return {}
    pairs = {
        "latent RL": (ROLLOUT, UPDATE),
        "latent RL in the paper's form": ("rollout by the paper's loop", TRUNK),
        "token level, generate()": ("rollout by generate(), base model", TOKENS),
    }
    found = {}
    for name, (rollout, update) in pairs.items():
        made, updated = record.find(case, rollout), record.find(case, update)
        if made is None or updated is None:
            continue
        found[name] = {
            "prefill": made["prefill_s"],
            "decode": made["decode_s"],
            "reward": ours["reward_s"],
            "keep": made.get("keep_s", 0.0),
            "update": updated["update_s"],
        }
    return found


def headings() -> tuple[str, ...]:
    """Of the table."""
    return ("contestant", "prefill s", "decode s", "reward s", "keep s", "update s", "total s",
            "peak GiB")  # fmt: skip


def lines(record: Record) -> list[Sequence[str]]:
    """Of the table: the rows, then whole iterations."""
    found: list[Sequence[str]] = []
    for row in record.rows:
        if row["status"] != "measured":
            found.append((row["contestant"], row["status"], "", "", "", "", "", ""))
            continue
        names = ("prefill_s", "decode_s", "reward_s", "keep_s", "update_s")
        cells = [f"{row[name]:.3f}" if name in row else "" for name in names]
        peak = row["peak_bytes"]
        memory = "" if peak is None else f"{peak / 2**30:.1f}"
        found.append((row["contestant"], *cells, "", memory))
    for case in _cases(record):
        for name, parts in totals(record, case).items():
            cells = [f"{seconds:.3f}" for seconds in parts.values()]
            found.append((f"iteration: {name}", *cells, f"{sum(parts.values()):.3f}", ""))
    return found


def _cases(record: Record) -> list[Row]:
    cases: list[Row] = []
    for row in record.rows:
        if row["case"] not in cases:
            cases.append(row["case"])
    return cases


def draw(record: Record, axes: Any) -> None:
    """Whole iterations, their parts stacked."""
    for axis, case in zip(axes, _cases(record), strict=True):
        made = totals(record, case)
        left = [0.0] * len(made)
        for part in ("prefill", "decode", "reward", "keep", "update"):
            widths = [parts[part] for parts in made.values()]
            axis.barh(list(made), widths, left=left, label=part)
            left = [at + width for at, width in zip(left, widths, strict=True)]
        axis.set(xlabel="seconds", title=f"{case['prompts']} x {case['group']} x {case['steps']}")
        axis.grid(alpha=0.3, axis="x")
        axis.legend(fontsize=7)
