"""Processes that fail together: what goes wrong on one is learnt by all, before any waits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

__all__ = ["PeerError", "on_all"]


class PeerError(RuntimeError):
    """Another process failed at what this one succeeded in."""


def on_all(accelerator: Accelerator, work: Callable[[], None], what: str) -> None:
    """Call `work` on every process, and return when it has succeeded on all of them.

    It must not wait for other processes after a step that may fail on one alone; such a step is
    put into an `on_all` of its own, inside.

    what: is done, for the message.

    Raises:
        Exception: what `work` raised on this process.
        PeerError: it succeeded here and failed on another process.
    """
    failure: Exception | None = None
    try:
        work()
    except Exception as error:  # noqa: BLE001  whatever it is, the others must not wait for it
        failure = error
    failed = torch.tensor([float(failure is not None)], device=accelerator.device)
    if not accelerator.gather(failed).any():
        return
    raise failure or PeerError(f"another process failed to {what}; its own error says why")
