"""Run any method of a model through the wrapper that distributed training put around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = ["forward_through"]

T = TypeVar("T")


def forward_through(wrapped: nn.Module, inner: nn.Module, function: Callable[[], T]) -> T:
    """Return function(), called from inside wrapped.forward when `inner` is wrapped.

    DistributedDataParallel prepares its gradient buckets in its own forward; a loss that calls
    other methods of the inner model would bypass that and leave gradients unsynchronised. For one
    call `inner.forward` is replaced by `function`, so that the wrapper's forward runs around it.
    """
    if wrapped is inner:
        return function()
    original = inner.__dict__.get("forward")

    def redirected(*_: Any) -> T:
        restore()
        return function()

    def restore() -> None:
        if original is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.__dict__["forward"] = original

    inner.__dict__["forward"] = redirected
    try:
        result: T = wrapped()
    finally:
        restore()
    return result
