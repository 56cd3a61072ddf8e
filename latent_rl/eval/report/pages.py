"""Self-contained HTML pages: a run's report, and runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from latent_rl.eval.compare import Comparison, compare
from latent_rl.eval.intervals import Interval
from latent_rl.eval.record import Evaluation
from latent_rl.eval.report.figures import curve_figure, inline, require_matplotlib, usage_figure
from latent_rl.eval.report.history import Curve, curves
from latent_rl.eval.report.template import TEMPLATES
from latent_rl.eval.summary import SIMILARITY, SplitSummary, summarise
from latent_rl.eval.writing import write_text

__all__ = ["environment", "verdict", "write_comparison", "write_run_report"]

MAX_TEXT = 20_000
_SPLITS = {"test": "in distribution (test)", "ood": "out of distribution (ood)"}
_LESS_IS_BETTER = ("self-BLEU", SIMILARITY)
# Neither more nor less of these is better in itself.
_NEUTRAL = ("tokens", "tokens spent")


@dataclass(frozen=True)
class _Part:
    """One evaluation on a run's page."""

    name: str
    evaluation: Evaluation
    summaries: Mapping[str, SplitSummary]
    warnings: tuple[str, ...]
    usage: Markup | None
    effects: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class _History:
    """One training on a run's page."""

    name: str
    picture: Markup
    labels: tuple[str, ...]
    left_out: int


def write_run_report(
    path: Path,
    *,
    title: str,
    evaluations: Mapping[str, Evaluation],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Write a run's report: evaluations by name, training logs by step; several evaluations are
    also compared with the first.

    Raises:
        ImportError: without matplotlib.
        ValueError: with neither evaluations nor histories.
    """
    require_matplotlib()
    if not evaluations and not histories:
        raise ValueError("report: needs evaluations or training logs, got neither")
    records = list(evaluations.values())
    compared = compare(records, names=list(evaluations)) if len(records) > 1 else None
    drawn = ((name, *curves(entries)) for name, entries in histories.items())
    page = environment().get_template("run_page")
    text = page.render(
        title=title,
        compared=compared,
        parts=[_part(name, record) for name, record in evaluations.items()],
        histories=[_history(name, found, left_out) for name, found, left_out in drawn if found],
    )
    write_text(path, text)


def write_comparison(
    path: Path, *, title: str, found: Comparison, evaluations: Sequence[Evaluation]
) -> None:
    """Write a comparison and what was compared (the same evaluations, in the same order)."""
    page = environment().get_template("compare_page")
    write_text(path, page.render(title=title, found=found, evaluations=evaluations))


def environment(more: Mapping[str, str] = MappingProxyType({})) -> Environment:
    """The pages' templates and ``more`` that may extend "base" and import "macros", by name; with
    autoescaping, and strict about names that are missing."""
    made = Environment(
        loader=DictLoader({**TEMPLATES, **more}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    about = made.get_template("about")
    made.globals |= {
        "number": _number,
        "cap": _cap,
        "split_title": lambda split: _SPLITS.get(split, split),
        "metric_names": _metric_names,
        "verdict": verdict,
        "about": lambda evaluation, name: Markup(  # rendered by a template that escapes
            about.render(evaluation=evaluation, name=name, facts=_facts(evaluation))
        ),
    }
    return made


def verdict(metric: str, difference: Interval) -> str:
    """The class of a difference: "better" or "worse" where its interval excludes 0, else ""."""
    if not difference.excludes_zero or metric in _NEUTRAL:
        return ""
    rises = difference.mean > 0
    return "better" if rises != (metric in _LESS_IS_BETTER) else "worse"


def _part(name: str, evaluation: Evaluation) -> _Part:
    summaries = summarise(evaluation)
    usages = [
        (_SPLITS.get(split, split), summary.usage.counts.tolist())
        for split, summary in summaries.items()
        if summary.usage is not None
    ]
    dropped = sum(summary.dropped for summary in summaries.values())
    answers = sum(summary.answers for summary in summaries.values())
    few = [split for split, summary in summaries.items() if summary.prompts < 20]
    warnings = [f"{dropped} of {answers} answers have no reward and were dropped"] * bool(dropped)
    warnings += [f"a reward reported: {error}" for error in evaluation.errors]
    warnings += [
        f"split {split} has fewer than 20 prompts: its intervals are too narrow" for split in few
    ]
    return _Part(
        name=name,
        evaluation=evaluation,
        summaries=summaries,
        warnings=tuple(warnings),
        usage=inline(lambda: usage_figure(usages)) if usages else None,
        effects={effect.code: effect.tokens for effect in evaluation.code_effects},
    )


def _history(name: str, found: Sequence[Curve], left_out: int) -> _History:
    picture = inline(lambda: curve_figure(found))
    return _History(name, picture, tuple(curve.name for curve in found), left_out)


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    settings = evaluation.settings
    rewards = ", ".join(f"{r.name} (weight {r.weight:g})" for r in evaluation.rewards)
    return [
        ("answerer", evaluation.name),
        *((name, str(value)) for name, value in evaluation.details.items()),
        ("rewards", rewards),
        ("samples, temperature", f"{settings.samples}, {settings.temperature:g}"),
        ("longest answer", f"{settings.max_new_tokens} tokens"),
        ("seed", str(settings.seed)),
        ("sentence encoder", evaluation.encoder or "none"),
        *((f"prompts of {name}", split.fingerprint) for name, split in evaluation.splits.items()),
        ("seconds", f"{evaluation.seconds:.1f}"),
        ("created", evaluation.created),
        *evaluation.versions.items(),
    ]


def _metric_names(summaries: Mapping[str, SplitSummary]) -> list[str]:
    return list(dict.fromkeys(name for summary in summaries.values() for name in summary.metrics))


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _cap(text: str) -> str:
    """Text cut where it would swell the page; the whole of it is in the JSON."""
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}… (cut after {MAX_TEXT} of {len(text)} characters)"
