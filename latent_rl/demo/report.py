"""Table, picture and self-contained HTML report of a demo run."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from PIL import Image
from rich.table import Table

from latent_rl.demo.report_template import TEMPLATE
from latent_rl.demo.result import ArmResult, DemoResult, Sample
from latent_rl.eval import Interval
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
    write_bytes(path, _picture(result))


def write_report(result: DemoResult, path: Path) -> None:
    """One HTML file with everything inlined; it needs no network and no other file."""
    environment = Environment(autoescape=True)
    text = environment.from_string(TEMPLATE).render(
        caption=_caption(result),
        headings=list(columns(result.arms[0])),
        rows=[list(columns(arm).values()) for arm in result.arms],
        picture=base64.b64encode(_picture(result)).decode(),
        losses=base64.b64encode(_loss_picture(result)).decode(),
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


def _picture(result: DemoResult) -> bytes:
    tasks = _tasks(result)
    figure, grid = _figure(len(tasks), 3)
    for row, task in zip(grid, tasks, strict=True):
        arms = [arm for arm in result.arms if arm.task == task]
        _draw_curves(row[0], task, arms)
        _draw_rewards(row[1], arms)
        _draw_codes(row[2], arms)
    return _png(figure)


def _figure(rows: int, width: int) -> tuple[Figure, Any]:
    # Agg draws without a display; the global pyplot state stays untouched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * width, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, width, squeeze=False)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to ``window - 1`` before it."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]


def _draw_curves(axes: Axes, task: str, arms: Sequence[ArmResult]) -> None:
    for arm in arms:
        if arm.curve:
            steps = range(1, len(arm.curve) + 1)
            axes.plot(steps, arm.curve, color=_COLOURS[arm.arm], alpha=0.25)
            axes.plot(steps, _smooth(arm.curve, 8), color=_COLOURS[arm.arm], label=arm.arm)
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
        axes.plot([x, x], [interval.low, interval.high], color="black", linewidth=1)


def _draw_codes(axes: Axes, arms: Sequence[ArmResult]) -> None:
    for arm in arms:
        if arm.code_counts:
            total = sum(arm.code_counts)
            shares = sorted((count / total for count in arm.code_counts), reverse=True)
            label = f"{arm.arm}: {arm.codes_used} used, perplexity {arm.code_perplexity:.1f}"
            axes.step(range(1, len(shares) + 1), shares, where="mid",
                      color=_COLOURS[arm.arm], label=label)  # fmt: skip
    axes.set(title="share of each code, most used first", xlabel="rank", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _loss_picture(result: DemoResult) -> bytes:
    stages = list(result.losses.items())
    figure, grid = _figure(1, max(len(stages), 1))
    for axes, (name, losses) in zip(grid[0], stages, strict=False):
        axes.plot(losses, alpha=0.3, color="#1f6fb4")
        axes.plot(_smooth(losses, max(1, len(losses) // 20)), color="#1f6fb4")
        axes.set(title=name.replace("_", " "), xlabel="logged step")
        axes.grid(alpha=0.3)
    return _png(figure)


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
            "image": _inline(image),
            "prompt": html.unescape(prompt),
            "answers": [
                {"arm": arm, "text": s.answer, "reward": f"{s.reward:.2f}", "codes": s.codes}
                for arm, s in answers
            ],
        }
        for (task, split, image, prompt), answers in grouped.items()
    ]


def _inline(path: str) -> str:
    """The picture, enlarged without smoothing, as base64 PNG."""
    with Image.open(path) as image:
        large = image.convert("RGB").resize((96, 96), Image.Resampling.NEAREST)
    out = io.BytesIO()
    large.save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode()
