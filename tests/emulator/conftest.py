"""Runs an op's CUDA row on CPU tensors: the same Python and bindings, emulated kernels."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_rl import backends

from .build import COMPILER, load_rooms
from .memory import GuardedMemory

# Threads and blocks take turns in these orders; the results must not show which.
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "shuffled": (2, 12345)}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """``emulated(op)`` puts the emulated kernels under the op's CUDA row and returns their module.

    After that the public op and the ``*_cuda`` functions take CPU tensors. ``rooms`` are the other
    rooms of ``kernels/`` whose kernels the row runs; ``modules`` those of ``latent_rl.native`` that
    call ``_C`` for it.
    """
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER} on this machine")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)

    def put(op: str, *, rooms: tuple[str, ...] = (), modules: tuple[str, ...] = ()) -> ModuleType:
        module = load_rooms(op, *rooms)
        for name in modules or (op,):
            monkeypatch.setattr(importlib.import_module(f"latent_rl.native.{name}"), "_C", module)
        if op in backends.OPS:
            row = next(row for row in backends._TABLE[op] if row.name in ("cuda", "hopper"))
            served = (replace(row, why_not=lambda request: None),)
            monkeypatch.setitem(backends._TABLE, op, served)
            backends._resolve.cache_clear()
            backends._implementation.cache_clear()
        return module

    return put


@pytest.fixture(autouse=True)
def _forget_resolved_rows() -> Iterator[None]:
    yield
    backends._resolve.cache_clear()
    backends._implementation.cache_clear()


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


@pytest.fixture
def in_every_order(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``in_every_order(module, call)`` -> what ``call`` returns, the same bits in every order.

    Outputs and workspaces come as garbage, and nothing may be written beside them.
    """

    def run(module: ModuleType, call: Callable[[], Any]) -> Any:
        results = []
        for order in ORDERS.values():
            module.set_order(*order)
            memory = GuardedMemory()
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", memory.empty)
                patch.setattr(torch, "empty_like", memory.empty_like)
                results.append(call())
            memory.check()
        for name, result in zip(ORDERS, results, strict=True):
            for first, other in zip(_tensors(results[0]), _tensors(result), strict=True):
                assert same_bits(first, other), f"the threads' order ({name}) shows in the result"
        return results[0]

    return run
