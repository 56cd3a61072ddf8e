"""Registration with torch: schema, implementation by dispatch table, shapes for the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latent_rl import backends
from latent_rl.ops.ranges import DOMAIN, NAMESPACE

# Kept alive for the life of the process: dropping a Library unregisters its ops.
_LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def define(
    op: str,
    function: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    finish: Callable[[Any], Any] | None = None,
    by_width: bool = False,
) -> None:
    """Define ``latent_rl::<function>`` and serve it from the dispatch table.

    Whatever backend serves a call, an NVTX range of the op's name lies around it, in the domain
    ``latent_rl``; it is closed when the call raises.

    Args:
        op: row of the dispatch table.
        function: implementation-level function of the rows.
        schema: arguments and results, ``(Tensor x) -> Tensor``.
        fake: shapes and dtypes of the results for meta tensors.
        finish: turns what the row returned into the results of the schema; nothing by default.
        by_width: whether rows of the table ask how wide the first tensor is.
    """

    message = DOMAIN.get_event_attributes(message=f"{NAMESPACE}::{function}")

    def kernel(*args: Any) -> Any:
        first = args[0]
        device = first.device
        width = first.shape[-1] if by_width else None
        request = backends.Request(device, first.dtype, width)
        DOMAIN.push_range(message)
        try:
            if torch.is_autocast_enabled(device.type):
                # What an implementation multiplies in float32 must stay float32.
                with torch.autocast(device.type, enabled=False):
                    result = backends.implementation(op, function, request)(*args)
            else:
                result = backends.implementation(op, function, request)(*args)
            return result if finish is None else finish(result)
        finally:
            DOMAIN.pop_range()

    _LIBRARY.define(function + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(function, kernel, key)
    torch.library.register_fake(f"{NAMESPACE}::{function}", fake, lib=_LIBRARY)


def differentiable(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Attach a backward to ``latent_rl::<name>``."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=_LIBRARY
    )


def accumulator(t: Tensor) -> torch.dtype:
    """dtype of sums and statistics over values of ``t``."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32
