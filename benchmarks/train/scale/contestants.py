"""Decoding, contestant by contestant: what a prompt costs, and what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import captured
from benchmarks.train.paper_loop import PaperLoop
from benchmarks.train.scale.clocks import Marks, call_ms, middle
from latent_rl.decode import Decoder
from latent_rl.decode.attention import attention_of
from latent_rl.decode.step import Step
from latent_rl.models import LatentActionModel

# Parts take a fraction of a millisecond: so many in a row are timed, so many times.
_PART_CALLS, _PART_ROUNDS = 10, 5


@dataclass(frozen=True)
class DecodeCase:
    """``rows`` completions of prompts of ``context`` tokens, ``group`` of them to a prompt."""

    rows: int
    context: int
    group: int

    def as_dict(self) -> dict[str, int]:
        """Of the record."""
        return asdict(self)

    @property
    def prompts(self) -> int:
        """Different prompts."""
        return self.rows // self.group


class HeldRun:
    """A run of the engine stopped behind its prompts: its steps can be made again and again.

    The steps are ``DecodeRun``'s own: the captured graph, the records of what was said, and the
    look at which rows ended.
    """

    def __init__(
        self, decoder: Decoder, inputs: Mapping[str, Tensor], case: DecodeCase, steps: int
    ) -> None:
        """Read the prompts; ``steps`` is how many can be made."""
        # Nobody ends before the last step.
        self.run = run = decoder.start(
            inputs, max_new_tokens=steps + 2, num_generations=case.group, seed=0
        )
        run._streams = False
        self.model, self.space, self.rows = decoder.model, run._space, case.rows
        device = self.model.device
        self.model.eval()
        self.space.begin(self.model)

        def read() -> None:
            with torch.no_grad():
                run._admit()

        self.prefill_ms = call_ms(read, device)
        if len(run._slots) != case.rows:
            raise RuntimeError(f"HeldRun: {len(run._slots)} of {case.rows} rows were admitted")
        self._saved = self.step.snapshot()

    @property
    def step(self) -> Step:
        """The engine's step."""
        found: Step = self.run._step()
        return found

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        attention = attention_of(self.model.decoder, self.model.latent.policy.tower)
        with torch.no_grad(), attention, self.space.weights():
            self.space.settle()
            yield

    def rewind(self) -> None:
        """To where the prompts had just been read."""
        with torch.no_grad():
            self.step.restore(self._saved)
        for slot in self.run._slots:
            slot.said = 1

    def advance(self, steps: int) -> float:
        """Milliseconds of some steps from the first on, looks at ended rows included."""
        self.rewind()

        def go() -> None:
            with self._stepping():
                for number in range(1, steps + 1):
                    self.run._advance()
                    if number % self.space.check_every == 0:
                        self.run._look()

        return call_ms(go, self.model.device)

    def parts_ms(self) -> dict[str, float]:
        """Trunk, policy and tail (code, merge, head, token) of the first step, each by itself.

        On a GPU each is a graph of its own: their sum is the step without what links them.
        """
        self.rewind()
        device = self.model.device
        found = {}
        with self._stepping():
            for name, call in self._parts().items():
                if device.type == "cuda":
                    call, problem = captured(call, device)
                    if problem != "CUDA graph":
                        raise RuntimeError(f"{name}: {problem}")
                call()
                found[name] = middle([_calls_ms(call, device) for _ in range(_PART_ROUNDS)])
        self.rewind()
        return found

    def _parts(self) -> dict[str, Callable[[], Any]]:
        """As ``Step.__call__``, in three; the rows' lengths stay as they are."""
        step, model, rows, n = self.step, self.model, self.space.rows, self.rows
        window = step._window
        longest = max(slot.cached for slot in self.run._slots)
        window.bound = bound = self.space.bound_of(longest)
        window.index = step._own_at[:n] + rows.lengths[:n] - rows.shared[:n]

        def trunk() -> Tensor:
            out = model.decoder(
                inputs_embeds=step._embed(rows.tokens[:n, None]),
                past_key_values=step._trunk.cache,
                use_cache=True,
                **step._tower_kwargs(n, bound),
            )
            hidden: Tensor = out.last_hidden_state
            return hidden

        hidden = trunk().clone()

        def policy() -> tuple[Tensor, Tensor]:
            state = model.project(hidden, rows.text_only[:n])
            logits = model.latent.policy(
                state, step._tower_kwargs(n, bound), past_key_values=step._policy.cache,
                last_only=True,
            )  # fmt: skip
            return state, logits[:, 0]

        state, logits = (tensor.clone() for tensor in policy())
        return {
            "trunk": trunk,
            "policy": policy,
            "tail": lambda: step.act(slice(0, n), state[:, 0], logits, hidden.dtype),
        }


def _calls_ms(call: Callable[[], Any], device: torch.device) -> float:
    def several() -> None:
        for _ in range(_PART_CALLS):
            call()

    return call_ms(several, device) / _PART_CALLS


@contextmanager
def decoder_calls(model: LatentActionModel) -> Iterator[Marks]:
    """A mark at every call of the backbone's decoder: one per step of a loop around it."""
    marks = Marks(model.device)
    handle = model.decoder.register_forward_pre_hook(lambda module, args: marks.set())
    try:
        yield marks
    finally:
        handle.remove()


@dataclass(frozen=True)
class LoopTimes:
    """Of a loop that calls the model once per token: all up to the second call, and a step."""

    prefill_ms: float
    step_ms: float
    steps_ms: float


def loop_times(model: LatentActionModel, loop: Callable[[], Any]) -> LoopTimes:
    """Time a loop of at least three steps; ``steps_ms`` is all of them, the median is a step's."""
    with decoder_calls(model) as marks:
        # The vision tower comes before the decoder's first call.
        marks.set()
        loop()
        marks.set()
    before, first, *steps = marks.gaps_ms()
    return LoopTimes(before + first, middle(steps), sum(steps))


def loops(model: LatentActionModel) -> dict[str, Callable[[Mapping[str, Tensor], int], Any]]:
    """Contestants by name: (prompts, one per completion; tokens each) -> completions."""
    paper = PaperLoop(model)

    def latent(inputs: Mapping[str, Tensor], steps: int) -> Any:
        return model.generate(inputs, max_new_tokens=steps, seed=0)

    def base(inputs: Mapping[str, Tensor], steps: int) -> Any:
        with model.disabled():
            return model.generate(inputs, max_new_tokens=steps, seed=0)

    return {
        "generate(), latent model": latent,
        "generate(), base model": base,
        "the paper's loop": lambda inputs, steps: paper(inputs, steps, []),
    }
