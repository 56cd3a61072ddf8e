"""Argument checks shared by the ops: TypeError for dtypes, ValueError for shapes and values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(op: str, name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}"
        )


def check_codes(op: str, name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {t.dtype}")


def check_ndim(op: str, name: str, t: Tensor, ndim: int, shape: str) -> None:
    if t.ndim != ndim:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {list(t.shape)}")


def check_shape(op: str, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(t.shape)}")


def check_like(op: str, name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Same device and dtype."""
    if t.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on {other_name}'s device ({other.device}), got {t.device}"
        )
    if t.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} must have {other_name}'s dtype ({other.dtype}), got {t.dtype}"
        )


def check_device(op: str, name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on {other_name}'s device ({other.device}), got {t.device}"
        )


def check_code_range(op: str, name: str, codes: Tensor, num_codes: int) -> None:
    """Codes lie in [-1, K). Read only on the CPU: on a GPU the check would be a host sync."""
    if codes.device.type != "cpu" or torch.compiler.is_compiling() or not codes.numel():
        return
    # NumPy takes half the time on few codes; on many, torch would wake its threads, which then spin
    # beside those of the op.
    values = codes.numpy()
    low = int(np.minimum.reduce(values, axis=None))
    high = int(np.maximum.reduce(values, axis=None))
    if low < -1 or high >= num_codes:
        raise ValueError(
            f"{op}: {name} must lie in [-1, {num_codes}), got values in [{low}, {high}]"
        )


def check_codebook(op: str, codebook: Tensor) -> None:
    check_float(op, "codebook", codebook)
    if codebook.shape[-2] == 0:
        raise ValueError(f"{op}: codebook must hold at least one code, got K = 0")


METRICS = ("l2", "cosine", "dot")


def check_metric(op: str, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"{op}: metric must be one of {', '.join(METRICS)}, got {metric!r}")
