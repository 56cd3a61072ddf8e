"""Measure ops and peers in one run; print a table, write one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Machine, describe
from benchmarks.registry import Call, Entry, Shape, entries
from benchmarks.timing import Timing, interleave
from latent_rl import backends

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure(
    entry: Entry,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    peers: Iterable[str] | None,
    *,
    rounds: int,
    budget_s: float,
) -> dict[str, Any]:
    """One row of the report: our timing, every peer's, and the ratios peer / ours."""
    inputs = entry.make_inputs(shape, device, dtype)
    calls: dict[str, Call] = {"latent_rl": entry.ours(inputs)}
    absent: dict[str, str] = {}
    for peer in entry.peers:
        if peers is not None and peer.name not in peers:
            continue
        try:
            calls[peer.name] = peer.make(inputs)
        except ImportError as missing:
            absent[peer.name] = str(missing)
    timings = interleave(calls, device, rounds=rounds, budget_s=budget_s)
    ours = timings["latent_rl"]
    seconds = ours.median_ms / 1e3
    return {
        "op": entry.op,
        "shape": dict(shape.sizes),
        "note": shape.note,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": serving_backend(entry, device),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "ratio_of_medians": ratios(timings, ours, "median_ms"),
        "ratio_of_p25": ratios(timings, ours, "p25_ms"),
        "gb_per_s": entry.bytes_moved(shape, dtype) / seconds / 1e9,
        "gflop_per_s": entry.flops(shape) / seconds / 1e9,
        "absent_peers": absent,
    }


def ratios(timings: dict[str, Timing], ours: Timing, field: str) -> dict[str, float]:
    """How many times longer than ours each peer took."""
    return {
        name: getattr(timing, field) / getattr(ours, field)
        for name, timing in timings.items()
        if timing is not ours
    }


def serving_backend(entry: Entry, device: torch.device) -> str:
    """The first row of the dispatch table that can run on this device, for the record."""
    return backends.serving(entry.op, device)


def table_of(rows: list[dict[str, Any]], machine: Machine) -> Table:
    table = Table(title=f"{machine.device}, {machine.threads} threads, commit {machine.commit}")
    for heading in ("op", "shape", "dtype", "backend", "median ms", "p20-p80", "GB/s", "GFLOP/s"):
        table.add_column(heading)
    table.add_column("peers: time / ours")
    for row in rows:
        ours = row["timings"]["latent_rl"]
        compared = [f"{name} {ratio:.2f}x" for name, ratio in row["ratio_of_medians"].items()]
        compared += [f"{name} absent" for name in row["absent_peers"]]
        table.add_row(
            row["op"],
            " ".join(f"{k}={v}" for k, v in row["shape"].items()),
            row["dtype"],
            row["backend"],
            f"{ours['median_ms']:.3f}",
            f"{ours['p20_ms']:.3f}-{ours['p80_ms']:.3f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['gflop_per_s']:.1f}",
            "\n".join(compared),
        )
    return table


def run(
    device_name: str,
    ops: list[str] | None,
    peers: list[str] | None,
    dtype_name: str,
    *,
    rounds: int,
    budget_s: float,
    output: Path | None,
    label: str = "",
) -> Path:
    """Measure the named ops (all by default) and return the path of the JSON written.

    Raises:
        ValueError: for an unknown op, dtype or peer name.
    """
    known = entries()
    unknown = set(ops or ()) - set(known)
    if unknown:
        raise ValueError(f"ops: unknown {sorted(unknown)}; known are {sorted(known)}")
    if dtype_name not in DTYPES:
        raise ValueError(f"dtype: expected one of {sorted(DTYPES)}, got {dtype_name!r}")
    all_peers = {peer.name for entry in known.values() for peer in entry.peers}
    if set(peers or ()) - all_peers:
        raise ValueError(f"peers: unknown {sorted(set(peers or ()) - all_peers)}")
    device = torch.device(device_name)
    machine = describe(device, label)
    rows = [
        measure(entry, shape, device, DTYPES[dtype_name], peers, rounds=rounds, budget_s=budget_s)
        for name, entry in sorted(known.items())
        if ops is None or name in ops
        for shape in entry.shapes
    ]
    Console().print(table_of(rows, machine))
    name = f"{machine.slug}-{machine.threads}t-{dtype_name}-{machine.commit}.json"
    path = output or RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine.as_dict(), "rows": rows}, indent=1) + "\n")
    return path
