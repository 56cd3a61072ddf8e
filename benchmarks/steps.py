"""Timed calls from differentiable steps: forward alone, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.registry import Call, Inputs, Make, Pass

Step = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]


def differentiated(step: Step, wanted: tuple[str, ...]) -> Make:
    """Calls of ``step``; the backward asks for the gradients of the inputs ``wanted``.

    The gradients handed to the outputs are dense random tensors, as a network's are, not the
    broadcast ones of a sum.
    """

    def make(inputs: Inputs, which: Pass) -> Call:
        if which is Pass.FORWARD:
            return lambda: _without_graph(step, inputs)
        leaves = {
            name: value.clone().requires_grad_() if name in wanted else value
            for name, value in inputs.items()
        }
        targets = [leaves[name] for name in wanted]
        grads = tuple(torch.randn_like(out) for out in step(leaves))
        return lambda: torch.autograd.grad(step(leaves), targets, grads)

    return make


def _without_graph(step: Step, inputs: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return step(inputs)


def compiled(step: Step, wanted: tuple[str, ...]) -> Make:
    """The same by ``torch.compile``, for the very shape (no dynamic sizes)."""

    def make(inputs: Inputs, which: Pass) -> Call:
        return differentiated(torch.compile(step, dynamic=False), wanted)(inputs, which)

    return make


def forward_only(step: Callable[[Inputs], object]) -> Make:
    """Calls of a step that has no backward; it returns what the entry's ``check`` takes."""

    def make(inputs: Inputs, which: Pass) -> Call:
        return lambda: step(inputs)

    return make
