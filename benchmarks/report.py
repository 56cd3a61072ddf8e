"""Results as a table in the terminal and as Markdown between two markers of a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.registry import OURS, UNITS
from benchmarks.results import Row, key_of

VERDICTS = {True: "met", False: "missed", None: "not measured"}
# Per device type, so that a summary of one leaves the other's alone, and per profile.
MARKERS = {
    "cpu": ("<!-- benchmarks:start -->", "<!-- benchmarks:end -->"),
    "cuda": ("<!-- benchmarks:cuda:start -->", "<!-- benchmarks:cuda:end -->"),
    "counters": ("<!-- counters:start -->", "<!-- counters:end -->"),
    "timeline": ("<!-- timeline:start -->", "<!-- timeline:end -->"),
}


def sizes_of(row: Row) -> str:
    return " ".join(f"{symbol}={size}" for symbol, size in row["shape"].items())


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def comparisons(row: Row) -> list[str]:
    """One line per contestant but ours: its time over ours, or why there is none."""
    lines = []
    for name, found in row["contestants"].items():
        if name == OURS:
            continue
        if found["status"] == "measured" and "speedup" in row:
            lines.append(f"{name} {row['speedup'][name]:.2f}x")
        elif found["status"] == "failed":
            lines.append(f"{name} failed: {found['reason']}")
    return lines


def verdicts(row: Row) -> list[str]:
    return [
        f"{goal['goal']}: {VERDICTS[goal['met']]}"
        + (f" ({goal['value']:.3g})" if goal["value"] is not None else "")
        for goal in row["goals"]
    ]


def quality_of(found: dict[str, Any]) -> str:
    quality = found.get("quality", {})
    words = [f"{100 * quality['wrong_share']:.2g} % wrong"] if "wrong_share" in quality else []
    if "hard_wrong_share" in quality:
        words[-1] += f" ({100 * quality['hard_wrong_share']:.2g} % offset)"
    if "reranked_share" in quality:
        words.append(f"{100 * quality['reranked_share']:.2g} % re-ranked")
    return ", ".join(words)


def absences(rows: Iterable[Row]) -> list[str]:
    """What took no part somewhere, by reason: nothing is left out silently."""
    names: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, found in row["contestants"].items():
            if found["status"] == "absent":
                names.setdefault(found["reason"], {})[f"{name} ({row['op']})"] = None
    return [f"{', '.join(found)}: {reason}" for reason, found in names.items()]


def table_of(rows: list[Row], machine: dict[str, Any]) -> Table:
    commit = machine["commit"] + ("-dirty" if machine["dirty"] else "")
    table = Table(title=f"{machine['device']}, commit {commit}", show_lines=True)
    for heading in ("op", "shape", "run", "ms: median", "p20-p80", "GB/s", "GFLOP/s", "roof"):
        table.add_column(heading)
    table.add_column("peers: time / ours")
    table.add_column("goals, quality")
    for row in rows:
        ours = row["contestants"][OURS]
        threads = f", {row['threads']} thr" if row["device"] == "cpu" else ""
        run = f"{row['pass']}\n{row['dtype']}{threads}\n{row['backend']}"
        if ours["status"] != "measured":
            numbers = ["failed", ours.get("reason", ""), "", "", ""]
        else:
            timing = ours["timing"]
            numbers = [
                milliseconds(timing["median_ms"]),
                f"{milliseconds(timing['p20_ms'])}-{milliseconds(timing['p80_ms'])}",
                f"{row['gb_per_s']:.1f}",
                f"{row['gflop_per_s']:.1f}",
                f"{100 * row['roof_share']:.0f} %",
            ]
        notes = verdicts(row) + ([quality_of(ours)] if quality_of(ours) else [])
        compared = "\n".join(comparisons(row))
        table.add_row(row["op"], sizes_of(row), run, *numbers, compared, "\n".join(notes))
    return table


def markdown(data: dict[str, Any], plot: str = "") -> str:
    """The summary for a README: speeds relative to peers, and who picks wrong codes."""
    machine, rows = data["machine"], data["rows"]
    commit = machine["commit"] + ("-dirty" if machine["dirty"] else "")
    threads = sorted({row["threads"] for row in rows})
    units = sorted({UNITS[row["device"]] for row in rows})
    lines = [
        f"{machine['device']}, torch {machine['torch']}, commit {commit}; "
        f"{_where(machine, threads)}. Ratios are the peer's time over ours "
        f"(25th percentiles of interleaved rounds, one process each); {', '.join(units)} is the "
        "product of the same contraction and nothing else.",
        "",
        "| op | pass | shape | dtype | ours, ms (median) | peers: time / ours | goals |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_markdown_row(group) for group in _grouped(rows)]
    lines += ["", *_wrong_codes(rows)]
    if absent := absences(rows):
        lines += ["", "Absent: " + "; ".join(absent) + "."]
    if plot:
        lines += ["", f"![Measured roofline]({plot})"]
    return "\n".join(lines)


def _where(machine: dict[str, Any], threads: list[int]) -> str:
    if machine["driver"]:
        return f"driver {machine['driver']}"
    return f"{' / '.join(str(t) for t in threads)} threads"


def _grouped(rows: list[Row]) -> list[list[Row]]:
    """Rows that differ in the number of threads alone, together and in that order."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row)[:4], []).append(row)
    return [sorted(group, key=lambda row: row["threads"]) for group in groups.values()]


def _markdown_row(group: list[Row]) -> str:
    first = group[0]

    def joined(values: Iterable[str]) -> str:
        return " / ".join(values)

    times = joined(
        milliseconds(row["contestants"][OURS]["timing"]["median_ms"])
        if row["contestants"][OURS]["status"] == "measured"
        else "failed"
        for row in group
    )
    names = list(dict.fromkeys(name for row in group for name in row["contestants"]))
    compared = []
    for name in names:
        ratios = [row.get("speedup", {}).get(name) for row in group]
        if any(ratio is not None for ratio in ratios):
            shown = joined("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
            compared.append(f"{name} {shown}")
        elif any(row["contestants"].get(name, {}).get("status") == "failed" for row in group):
            compared.append(f"{name} failed")
    shape = sizes_of(first).replace("=", " ")
    cells = [f"`{first['op']}`", first["pass"], shape, first["dtype"], times, "; ".join(compared)]
    cells.append("; ".join(_goals(group)))
    return "| " + " | ".join(cells) + " |"


def _goals(group: list[Row]) -> list[str]:
    """Each goal of the shape with its outcome per number of threads."""
    outcomes: dict[str, list[str]] = {}
    for row in group:
        for goal in row["goals"]:
            outcomes.setdefault(goal["goal"], []).append(VERDICTS[goal["met"]])
    return [f"{goal}: {' / '.join(found)}" for goal, found in outcomes.items()]


def _wrong_codes(rows: list[Row]) -> list[str]:
    """Who chose a code that float64 says is farther than another; threads change nothing here."""
    lines = []
    for group in _grouped(rows):
        row = group[0]
        found = {
            name: quality_of(contestant)
            for name, contestant in row["contestants"].items()
            if quality_of(contestant)
        }
        if found:
            listed = "; ".join(f"{name} {words}" for name, words in found.items())
            lines.append(f"| {sizes_of(row).replace('=', ' ')} | {row['dtype']} | {listed} |")
    if lines:
        heading = "| nearest code | dtype | wrong by float64 (the same data with an offset of 8) |"
        lines = [heading, "|---|---|---|", *lines]
    return lines


def check_markers(path: Path, device: str) -> None:
    """Refuse a file without the two markers, before hours of measuring rather than after."""
    start, end = MARKERS[device]
    text = path.read_text() if path.is_file() else ""
    if start not in text or end not in text.split(start, 1)[1]:
        raise ValueError(f"{path}: expected the lines {start} and {end} in this order")


def write_between(path: Path, text: str, device: str) -> None:
    """Replace what stands between the markers of a device type."""
    check_markers(path, device)
    start, end = MARKERS[device]
    before, rest = path.read_text().split(start, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{start}\n{text}\n{end}{after}")
