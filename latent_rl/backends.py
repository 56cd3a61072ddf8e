"""The one dispatch table: which implementation serves which op, and why not another.

Per op the rows are tried in order; the first that has nothing against the request serves it.
``LATENT_RL_BACKEND`` forces: ``reference`` forces every op that has such a row,
``nearest_code=native,sample_codes=cuda`` forces op by op. A forced row that cannot run raises and
says why, together with what speaks against every other row. Nothing falls back silently.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["OPS", "Request", "Row", "explain", "implementation", "resolve", "serving"]

ENVIRONMENT_VARIABLE = "LATENT_RL_BACKEND"


class Request(NamedTuple):
    """What a call asks for: where its tensors are, their dtype, and how wide the first one is.

    ``width`` is None where no row asks for it, or where the question is about any width.

    One is made in every call: a tuple costs a third of a frozen dataclass, made and hashed.
    """

    device: torch.device
    dtype: torch.dtype
    width: int | None = None


@dataclass(frozen=True)
class Row:
    """One implementation of one op.

    ``module`` holds the implementation-level functions, each named as in the reference with
    ``suffix`` appended; ``why_not`` says what speaks against serving a request, or None. What the
    row does as ``backward_of`` does, that row serves.
    """

    name: str
    module: str
    why_not: Callable[[Request], str | None]
    suffix: str = ""
    backward_of: Row | None = None

    def function(self, name: str) -> Callable[..., Any]:
        if self.backward_of is not None and name.endswith("_backward"):
            return self.backward_of.function(name)
        return _load(self.module, name + self.suffix)


@functools.cache
def _load(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


@functools.cache
def _extension_problem() -> str | None:
    if importlib.util.find_spec("latent_rl._C") is None:
        return "the extension latent_rl._C is not built"
    return None


@functools.cache
def _extension_has_cuda() -> bool:
    return _extension_problem() is None and bool(importlib.import_module("latent_rl._C").has_cuda)


@functools.cache
def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_reference(request: Request) -> str | None:
    return None


def _why_not_native(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"runs on the CPU, tensors are on {request.device}"
    return _extension_problem()


def _why_not_cuda(request: Request) -> str | None:
    if request.device.type != "cuda":
        return f"runs on CUDA devices, tensors are on {request.device}"
    if request.dtype == torch.float64:
        return "float64 is served by the reference on CUDA devices"
    if not _extension_has_cuda():
        return _extension_problem() or "the extension was built without CUDA"
    return None


def _why_not_triton(request: Request) -> str | None:
    if problem := _triton_problem():
        return problem
    if request.dtype == torch.float64:
        return "float64 is not served by the Triton kernel"
    if request.device.type == "cuda" or (request.device.type == "cpu" and _interpreted()):
        return None
    return f"runs on CUDA devices (or with TRITON_INTERPRET=1), tensors are on {request.device}"


def _why_not_hopper(request: Request) -> str | None:
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {request.dtype}"
    if request.width is not None and request.width > 256:
        return f"takes widths up to 256, got {request.width}"
    # Preparation and the second search are Triton's.
    if problem := _why_not_cuda(request) or _triton_problem():
        return problem
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(request.device)
    if (major, minor) != (9, 0):
        return f"is written for sm_90 (Hopper), {request.device} is sm_{major}{minor}"
    return None


def _why_not_triton_unforced(request: Request) -> str | None:
    """On the CPU the interpreter serves only where it was asked for: it is for testing."""
    if request.device.type == "cpu" and _interpreted():
        return "the interpreter serves only when forced"
    return _why_not_triton(request)


def _reference(op: str) -> Row:
    return Row("reference", f"latent_rl.reference.{op}", _why_not_reference)


def _native(op: str) -> Row:
    return Row("native", f"latent_rl.native.{op}", _why_not_native)


def _triton(op: str) -> Row:
    return Row("triton", f"latent_rl.kernels.{op}.triton_impl", _why_not_triton)


def _cuda(op: str, module: str | None = None) -> Row:
    return Row("cuda", f"latent_rl.native.{module or op}", _why_not_cuda, suffix="_cuda")


def _why_not_fused_merge(request: Request) -> str | None:
    if request.dtype == torch.float32:
        return "float32 has no matrix unit; its products are cuBLAS's"
    problem = _why_not_triton(request)
    if problem is None and request.device.type == "cuda":
        # Its backward is the CUDA row's.
        problem = _why_not_cuda(request)
    return problem


def _fused_merge() -> Row:
    """The forward in one Triton kernel; the backward is the CUDA row's."""
    return Row(
        "triton",
        "latent_rl.kernels.gated_merge.triton_impl",
        _why_not_fused_merge,
        backward_of=_cuda("gated_merge", "gated_merge_cuda"),
    )


_TABLE: dict[str, tuple[Row, ...]] = {
    "nearest_code": (
        _triton("nearest_code"),
        # After Triton, so that it serves only where it is asked for: never run on hardware.
        Row("hopper", "latent_rl.kernels.nearest_code.hopper_impl", _why_not_hopper),
        _native("nearest_code"),
        _reference("nearest_code"),
    ),
    "quantize": (
        _cuda("quantize", "quantize_cuda"),
        _native("quantize"),
        _reference("quantize"),
    ),
    "gumbel_quantize": (
        _cuda("gumbel_quantize", "gumbel_quantize_cuda"),
        _native("gumbel_quantize"),
        _reference("gumbel_quantize"),
    ),
    "gated_merge": (
        _cuda("gated_merge", "gated_merge_cuda"),
        _fused_merge(),
        _native("gated_merge"),
        _reference("gated_merge"),
    ),
    "sample_codes": (_cuda("sample_codes"), _native("sample_codes"), _reference("sample_codes")),
    "sample_tokens": (
        _cuda("sample_tokens"),
        _native("sample_tokens"),
        _reference("sample_tokens"),
    ),
    "code_logprobs": (
        _cuda("code_logprobs", "code_logprobs_cuda"),
        _native("code_logprobs"),
        _reference("code_logprobs"),
    ),
    "slot_attention": (
        _triton("slot_attention"),
        _native("slot_attention"),
        _reference("slot_attention"),
    ),
}

OPS = tuple(_TABLE)


def implementation(op: str, function: str, request: Request) -> Callable[..., Any]:
    """The function named ``function`` (as in the reference) of the row serving ``request``."""
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "")
    # The interpreter serves only where it is forced. Reading a variable costs about 1 us.
    return _implementation(op, function, request, forced, forced != "" and _interpreted())


@functools.cache
def _implementation(
    op: str, function: str, request: Request, forced: str, interpreted: bool
) -> Callable[..., Any]:
    return _resolve(op, request, forced, interpreted).function(function)


def resolve(op: str, request: Request) -> Row:
    """The row that serves a request.

    Raises:
        RuntimeError: when the forced row cannot run, naming every row's reason.
        ValueError: when the environment forces a row or an op that does not exist.
    """
    return _resolve(op, request, os.environ.get(ENVIRONMENT_VARIABLE, ""), _interpreted())


@functools.cache
def _resolve(op: str, request: Request, forced: str, interpreted: bool) -> Row:
    wanted = _forced_name(op, forced)
    if wanted is not None:
        return _forced_row(op, request, wanted)
    for row in _TABLE[op]:
        interpreter_only = row.name == "triton" and request.device.type == "cpu"
        why_not = _why_not_triton_unforced(request) if interpreter_only else row.why_not(request)
        if why_not is None:
            if row.name == "reference" and request.device.type != "cpu":
                warnings.warn(
                    f"{op}: no kernel serves {request.dtype} on {request.device.type}, using the "
                    f"PyTorch reference ({_reasons(op, request)})",
                    stacklevel=2,
                )
            return row
    raise RuntimeError(f"{op}: no backend can serve {request}: {_reasons(op, request)}")


def _forced_row(op: str, request: Request, wanted: str) -> Row:
    row = next(row for row in _TABLE[op] if row.name == wanted)
    if row.why_not(request) is not None:
        raise RuntimeError(
            f"{op}: {ENVIRONMENT_VARIABLE} forces {wanted}, which cannot serve this call; "
            f"{_reasons(op, request)}"
        )
    return row


def _reasons(op: str, request: Request) -> str:
    return "; ".join(f"{row.name}: {row.why_not(request) or 'can serve it'}" for row in _TABLE[op])


@functools.cache
def _forced_name(op: str, forced: str) -> str | None:
    """The row name ``forced`` (the environment variable's value) asks for, for ``op``."""
    every_name = {row.name for rows in _TABLE.values() for row in rows}
    chosen = None
    for item in filter(None, (part.strip() for part in forced.split(","))):
        target, _, name = item.rpartition("=")
        if target and target not in _TABLE:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: unknown op {target!r}; ops are {', '.join(OPS)}"
            )
        available = {row.name for row in _TABLE[target]} if target else every_name
        if name not in available:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: unknown backend {name!r} in {item!r}; "
                f"expected one of {', '.join(sorted(available))}"
            )
        applies = target == op or (not target and any(r.name == name for r in _TABLE[op]))
        if applies:
            chosen = name
    return chosen


def explain(op: str, request: Request | None = None) -> list[tuple[str, str | None]]:
    """Every row of an op with what speaks against it, or None, for ``latent-rl doctor``.

    ``request`` defaults to float32 on the first CUDA device, or on the CPU where there is none.
    """
    if op not in _TABLE:
        raise ValueError(f"explain: unknown op {op!r}; ops are {', '.join(OPS)}")
    asked = request or Request(
        torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32
    )
    return [(row.name, row.why_not(asked)) for row in _TABLE[op]]


def serving(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Name of the row that serves ``op`` on ``device``."""
    return resolve(op, Request(device, dtype)).name
