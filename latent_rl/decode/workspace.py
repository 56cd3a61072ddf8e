"""What a decoder keeps between calls: slots, caches, steps and their graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from latent_rl.decode.casts import WeightCasts
from latent_rl.decode.graphs import StepGraphs
from latent_rl.decode.output import Said
from latent_rl.decode.prefill import Prefill
from latent_rl.decode.settings import DecodeSettings
from latent_rl.decode.slot_cache import SlotLayout, SlotStore, SlotWindow, layer_shapes
from latent_rl.decode.step import Rows, Step
from latent_rl.models import LatentActionModel
from latent_rl.nn.precision import autocast_dtype

__all__ = ["Workspace"]

# On CUDA positions are looked for up to a multiple of this, with a graph for each.
_CUDA_BLOCK = 256
_CUDA_CHECK_EVERY = 8


class Workspace:
    """Storage for prompts and slots, and the steps over it.

    Attributes:
        layout: how many of both, and how long.
        rows, said: the slots' state and what the last step said.
        requests: int64 [slots], the results' row of each slot.
        trunk, policy: key-value storage.
        tables: of the merge, see ``LatentActionModel.merge_tables``.
        check_every: steps between looks at which slots ended.
    """

    def __init__(
        self,
        model: LatentActionModel,
        layout: SlotLayout,
        *,
        cuda_graphs: bool | None,
        check_every: int | None,
        compiled: bool,
    ) -> None:
        """Allocate everything.

        Raises:
            ValueError: for graphs away from CUDA, or layers without a static cache.
        """
        device = model.device
        on_cuda = device.type == "cuda"
        if cuda_graphs and not on_cuda:
            raise ValueError(f"Decoder: cuda_graphs need a CUDA device, the model is on {device}")
        self.check_every = check_every or (_CUDA_CHECK_EVERY if on_cuda else 1)
        self.layout, self.slots, self.device = layout, layout.slots, device
        self._block = _CUDA_BLOCK if on_cuda else layout.longest
        self._graphs = StepGraphs() if on_cuda and cuda_graphs is not False else None
        self._window = SlotWindow(0, torch.zeros(0, dtype=torch.int64, device=device))
        self._dtypes = _dtypes(model)
        self.trunk, self.policy = (
            SlotStore(layer_shapes(stack), layout, self._window, dtype=dtype, device=device)
            for stack, dtype in zip(
                (model.decoder, model.latent.policy.tower), self._dtypes, strict=True
            )
        )
        slots = layout.slots
        self.requests = torch.zeros(slots, dtype=torch.int64, device=device)
        self.said = Said.empty(
            slots, int(model.decoder.config.hidden_size), self._dtypes[0], device
        )
        self._num_codes = model.latent_config.num_codes
        self.tables = model.merge_tables()
        self.rows = Rows.empty(slots, 1, self._num_codes, device)
        self._steps: dict[_StepKey, Step] = {}
        self._casts: WeightCasts | None = None
        # Of this stretch: compiled steps whose guards have been looked at for this many rows.
        self._known: set[tuple[Step, int]] = set()
        self._compiled: dict[Step, Callable[[int, int], None]] | None = {} if compiled else None

    def serves(self, model: LatentActionModel, layout: SlotLayout) -> bool:
        """Whether it is large enough and of the model's device and dtypes."""
        return (
            self.layout.serves(layout)
            and self.device == model.device
            and self._dtypes == _dtypes(model)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the caches, by far the largest part, and of the merge's tables."""
        tables = sum(t.numel() * t.element_size() for t in self.tables)
        casts = 0 if self._casts is None else self._casts.num_bytes
        return self.trunk.num_bytes + self.policy.num_bytes + tables + casts

    def use_positions(self, count: int) -> None:
        """Make room for ``count`` rotary positions per token.

        Text has one, images have three or four; a prompt of text alone counts one among images.

        Raises:
            RuntimeError: for three among four or the reverse.
        """
        held = self.rows.positions.shape[0]
        if count in (1, held):
            return
        if held != 1:
            raise RuntimeError(f"Decoder: {count} rotary positions per token after {held}")
        self.rows.positions = self.rows.positions.repeat(count, 1)
        self._forget()

    def begin(self, model: LatentActionModel) -> None:
        """No slot speaks (after an interrupted run some still seem to); old graphs may be stale."""
        if self._graphs is not None:
            self._graphs.check_weights(model)
        if model.is_active:
            self._make_tables(model)
            self._make_casts(model)
        self.rows.active.zero_()
        self.rows.steps.zero_()
        self.rows.lengths.zero_()
        self.rows.shared.zero_()

    def _make_tables(self, model: LatentActionModel) -> None:
        """The merge's tables under the weights of now, where graphs look for them."""
        for held, new in zip(self.tables, model.merge_tables(), strict=True):
            held.copy_(new)

    def _make_casts(self, model: LatentActionModel) -> None:
        """The weights of now in autocast's dtype, where graphs look for them."""
        dtype = autocast_dtype(self.device)
        if dtype is None:
            return
        held = self._casts
        if held is None or held.dtype != dtype or not held.fits(model):
            # Free the old ones first; steps that were captured or compiled read them.
            self._casts = None
            self._forget()
            self._casts = WeightCasts(model, dtype)
        cast(WeightCasts, self._casts).refresh()

    def weights(self) -> AbstractContextManager[None]:
        """Under autocast, let steps read the copies of the weights made by :meth:`begin`."""
        held = self._casts
        if held is None or held.dtype != autocast_dtype(self.device):
            return nullcontext()
        return held.use()

    def step_of(
        self, model: LatentActionModel, settings: DecodeSettings, *, forced: bool, allowed: bool
    ) -> Step:
        """The step under these settings; the same object, with its graphs, on every call."""
        # What was captured under autocast is another step.
        key = (settings, forced, allowed, model.is_active, autocast_dtype(self.device))
        if key not in self._steps:
            self._steps[key] = Step(
                model,
                self.rows,
                self.said,
                (self.trunk, self.policy),
                self._window,
                self.tables,
                settings,
                forced=forced,
                allowed=allowed,
            )
        return self._steps[key]

    def bound_of(self, longest: int) -> int:
        """Positions to look for when the longest row has cached ``longest`` and adds one."""
        return min(self.layout.longest, -(-(longest + 1) // self._block) * self._block)

    def advance(self, step: Step, n: int, longest: int) -> None:
        """Run the step on the first n slots, through a graph where there are graphs."""
        bound = self.bound_of(longest)
        call = self._callable(step)
        if self._graphs is not None:
            self._graphs.run(step, call, n, self.slots, bound)
        elif (step, n) in self._known:
            with _unguarded():
                call(n, bound)
        else:
            call(n, bound)
            if self._compiled is not None:
                self._known.add((step, n))

    def settle(self) -> None:
        """A stretch of steps begins: what happened since the last one is not known."""
        self._known.clear()

    def _callable(self, step: Step) -> Callable[[int, int], None]:
        if self._compiled is None:
            return step
        if step not in self._compiled:
            # Hundreds of small kernels: launched from C++, a step is a quarter faster on the CPU.
            options: dict[str, Any] | None = (
                {"cpp_wrapper": True} if self.device.type == "cpu" else None
            )
            self._compiled[step] = torch.compile(step.__call__, options=options)
        return self._compiled[step]

    def load_prompt(self, read: Prefill, place: int) -> None:
        """Keep a prompt's keys and values at one of the prompts' places."""
        if read.trunk is not None:
            self.trunk.load(read.trunk, place)
        if read.policy is not None:
            self.policy.load(read.policy, place)

    def move(self, source: int, target: int, length: int) -> None:
        """Put a slot, with ``length`` positions of its own, in the place of another."""
        self.trunk.move(source, target, length)
        self.policy.move(source, target, length)
        self.rows.move(source, target)
        self.requests[target] = self.requests[source]

    def _forget(self) -> None:
        self._steps.clear()
        if self._compiled is not None:
            self._compiled.clear()
        if self._graphs is not None:
            self._graphs.clear()


_StepKey = tuple[DecodeSettings, bool, bool, bool, torch.dtype | None]


def _unguarded() -> AbstractContextManager[Any]:
    """Without the guards of compiled code: nobody changes a model between two steps of a stretch.

    Looking at a thousand of them takes as long as a third of a small model's step.
    """
    try:
        stance: AbstractContextManager[Any] = torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    except TypeError:  # torch 2.6
        return nullcontext()
    return stance


def _dtypes(model: LatentActionModel) -> tuple[torch.dtype, torch.dtype]:
    weight: Tensor = model.latent.policy.head.weight
    return model.dtype, weight.dtype
