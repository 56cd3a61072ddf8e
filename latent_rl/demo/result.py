"""What a run of the demo ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from latent_rl.eval import Interval

__all__ = ["ArmResult", "DemoResult", "Sample", "WorldModelNumbers", "result_from_json"]


@dataclass(frozen=True)
class Sample:
    """One conversation to look at.

    Attributes:
        image: the picture as a data URI. split: "test" or "ood". prompt, answer: text.
        reward: of the answer. codes: latent actions of the answer, empty for token-level arms.
    """

    image: str
    split: str
    prompt: str
    answer: str
    reward: float
    codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class ArmResult:
    """One arm of the comparison on one task.

    Attributes:
        arm: "SFT", "token RL", "cloned policy" or "latent RL". task: the task's name.
        test, ood: reward of sampled answers (T = 1) on held-out pictures, with known and with
            held-out personas or role sets, and its interval over evaluation seeds.
        greedy_test, greedy_ood: reward at T = 0.
        distinct_at_8: share of different answers among 8 samples of a prompt.
        rollout_seconds, update_seconds: of the whole RL run; None for arms without RL.
        codes_used, code_perplexity: over the evaluation; None for token-level arms.
        curve: mean training reward of every RL step, empty without RL.
        code_counts: occurrences per code over the evaluation.
        samples: conversations to show.
    """

    arm: str
    task: str
    test: Interval
    ood: Interval
    greedy_test: float
    greedy_ood: float
    distinct_at_8: float
    rollout_seconds: float | None = None
    update_seconds: float | None = None
    codes_used: int | None = None
    code_perplexity: float | None = None
    curve: tuple[float, ...] = ()
    code_counts: tuple[int, ...] = ()
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class WorldModelNumbers:
    """Cross-entropies in nats per response token on held-out dialogues, see ``latent_rl.eval``."""

    base: float
    inverse: float
    random: float
    marginal: float


@dataclass(frozen=True)
class DemoResult:
    """Everything the table, the picture and the report show.

    Attributes:
        settings: the demo's settings as plain values.
        machine: processor, threads and versions.
        arms: results in the table's order.
        world_model: does it listen to its codes?
        num_codes: K.
        step_seconds: wall seconds of every step of the pipeline, in order.
        losses: training loss along every training step of the pipeline.
        code_tokens: per code, the tokens it speaks for most.
        rl_budget: rollouts per RL arm and task.
        evaluation_seeds: number of seeds behind each interval.
    """

    settings: dict[str, object]
    machine: dict[str, object]
    arms: tuple[ArmResult, ...]
    world_model: WorldModelNumbers
    num_codes: int
    step_seconds: dict[str, float]
    losses: dict[str, tuple[float, ...]] = field(default_factory=dict)
    code_tokens: dict[int, tuple[str, ...]] = field(default_factory=dict)
    rl_budget: int = 0
    evaluation_seeds: int = 0


def result_from_json(data: dict[str, Any]) -> ArmResult:
    """The arm that ``dataclasses.asdict`` turned into plain values."""
    values = dict(data)
    values["test"] = Interval(**values["test"])
    values["ood"] = Interval(**values["ood"])
    values["curve"] = tuple(values["curve"])
    values["code_counts"] = tuple(values["code_counts"])
    values["samples"] = tuple(
        Sample(**{**sample, "codes": tuple(sample["codes"])}) for sample in values["samples"]
    )
    return ArmResult(**values)
