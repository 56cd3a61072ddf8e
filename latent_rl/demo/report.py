"""Table, picture and self-contained HTML report of a demo run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from latent_rl.demo.report_template import TEMPLATE
from latent_rl.demo.result import ArmResult, DemoResult, Sample
from latent_rl.eval import Interval
from latent_rl.eval.report import environment
from latent_rl.eval.report.figures import draw_usage, inline, new_figure, running_mean
from latent_rl.eval.writing import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["columns", "table", "write_picture", "write_report"]

_COLOURS = {
    "SFT": "#9aa0a6",
    "token RL": "#d9822b",
    "cloned policy": "#8fb8de",
    "latent RL": "#1f6fb4",
}


def columns(arm: ArmResult) -> dict[str, str]:
    """Heading -> text of one row of the table."""
    return {
        "task": arm.task,
        "arm": arm.arm,
        "reward, ID": str(arm.test),
        "reward, OOD": str(arm.ood),
        "T=0, ID / OOD": f"{arm.greedy_test:.3f} / {arm.greedy_ood:.3f}",
        "distinct@8": f"{arm.distinct_at_8:.2f}",
        "rollout s": _seconds(arm.rollout_seconds),
        "update s": _seconds(arm.update_seconds),
        "codes": "-" if arm.codes_used is None else str(arm.codes_used),
    }


def table(result: DemoResult) -> Table:
    """The rich table a run ends with."""
    shown = Table(title=_caption(result), title_justify="left")
    for heading in columns(result.arms[0]):
        shown.add_column(heading, justify="left" if heading in ("task", "arm") else "right")
    for index, arm in enumerate(result.arms):
        last = index + 1 == len(result.arms) or result.arms[index + 1].task != arm.task
        shown.add_row(*columns(arm).values(), end_section=last)
    return shown


def write_picture(result: DemoResult, path: Path) -> None:
    """The picture: training rewards, final rewards with intervals, use of the codes."""
    out = io.BytesIO()
    _picture(result).savefig(out, format="png", dpi=110)
    write_bytes(path, out.getvalue())


def write_report(result: DemoResult, path: Path) -> None:
    """One HTML file with everything inlined; it needs no network and no other file."""
    text = (
        environment({"demo": TEMPLATE})
        .get_template("demo")
        .render(
            title="latent-rl demo",
            caption=_caption(result),
            headings=list(columns(result.arms[0])),
            rows=[list(columns(arm).values()) for arm in result.arms],
            picture=inline(lambda: _picture(result)),
            losses=inline(lambda: _loss_picture(result)),
            world_model=result.world_model,
            code_tokens=sorted(result.code_tokens.items()),
            num_codes=result.num_codes,
            seconds=result.step_seconds,
            total_seconds=sum(result.step_seconds.values()),
            settings=result.settings,
            machine=result.machine,
            budget=result.rl_budget,
            conversations=_conversations(result),
        )
    )
    write_text(path, text)


def _caption(result: DemoResult) -> str:
    return (
        "Mean reward of sampled answers (T = 1), in (ID) and out of distribution (OOD), with its "
        f"95 % interval over {result.evaluation_seeds} evaluation seeds; {result.rl_budget} "
        f"rollouts per RL arm; {result.settings['algorithm']}, seed {result.settings['seed']}"
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _tasks(result: DemoResult) -> list[str]:
    return list(dict.fromkeys(arm.task for arm in result.arms))


def _picture(result: DemoResult) -> Figure:
    tasks = _tasks(result)
    figure, grid = new_figure(len(tasks), 3, width=4.6, height=3.4)
    for row, task in zip(grid, tasks, strict=True):
        arms = [arm for arm in result.arms if arm.task == task]
        _draw_curves(row[0], task, arms)
        _draw_rewards(row[1], arms)
        _draw_codes(row[2], arms)
    return figure


def _draw_curves(axes: Axes, task: str, arms: Sequence[ArmResult]) -> None:
    for arm in arms:
        if arm.curve:
            steps = range(1, len(arm.curve) + 1)
            axes.plot(steps, arm.curve, color=_COLOURS[arm.arm], alpha=0.25)
            axes.plot(steps, running_mean(arm.curve, 8), color=_COLOURS[arm.arm], label=arm.arm)
    axes.set(title=f"{task}: reward in training", xlabel="RL step", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _draw_rewards(axes: Axes, arms: Sequence[ArmResult]) -> None:
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        for place, interval in enumerate((arm.test, arm.ood)):
            x = place + (index - (len(arms) - 1) / 2) * width
            axes.bar(x, interval.mean, width * 0.92, color=_COLOURS[arm.arm],
                     label=arm.arm if place == 0 else None)  # fmt: skip
            _whisker(axes, x, interval)
    axes.set_xticks([0, 1], ["in distribution", "out of distribution"])
    # Room for the legend above the tallest bar.
    axes.set(title="reward after training (T = 1)", ylim=(0, 1.25))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", ncols=4, loc="upper center", columnspacing=0.8)


def _whisker(axes: Axes, x: float, interval: Interval) -> None:
    if interval.low == interval.low:
        # Grey shows on white and on black.
        axes.plot([x, x], [interval.low, interval.high], color="#808080", linewidth=1.5)


def _draw_codes(axes: Axes, arms: Sequence[ArmResult]) -> None:
    shown = [arm for arm in arms if arm.code_counts]
    labels = [f"{a.arm}: {a.codes_used} used, perplexity {a.code_perplexity:.1f}" for a in shown]
    usages = [(label, arm.code_counts) for label, arm in zip(labels, shown, strict=True)]
    draw_usage(axes, usages, [_COLOURS[arm.arm] for arm in shown])
    axes.set(title="share of each code")


def _loss_picture(result: DemoResult) -> Figure:
    stages = list(result.losses.items())
    figure, grid = new_figure(1, max(len(stages), 1), width=4.6, height=3.4)
    for axes, (name, losses) in zip(grid[0], stages, strict=False):
        axes.plot(losses, alpha=0.3, color="#1f6fb4")
        axes.plot(running_mean(losses, max(1, len(losses) // 20)), color="#1f6fb4")
        axes.set(title=name.replace("_", " "), xlabel="logged step")
        axes.grid(alpha=0.3)
    return figure


def _conversations(result: DemoResult) -> list[dict[str, Any]]:
    """Samples grouped by picture and prompt, so that the arms' answers stand side by side."""
    grouped: dict[tuple[str, str, str, str], list[tuple[str, Sample]]] = {}
    for arm in result.arms:
        for sample in arm.samples:
            key = (arm.task, sample.split, sample.image, sample.prompt)
            grouped.setdefault(key, []).append((arm.arm, sample))
    return [
        {
            "task": task,
            "split": "in distribution" if split == "test" else "out of distribution",
            "image": image,
            "prompt": prompt,
            "answers": [
                {"arm": arm, "text": s.answer, "reward": f"{s.reward:.2f}", "codes": s.codes}
                for arm, s in answers
            ],
        }
        for (task, split, image, prompt), answers in grouped.items()
    ]
