"""One call of the engine: the queue, the slots, and what was finished so far."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latent_rl.decode.attention import attention_of
from latent_rl.decode.collect import collect, pad_id
from latent_rl.decode.output import DecodeError, DecodeOutput, Piece, Results
from latent_rl.decode.prefill import Prefill, prefill
from latent_rl.decode.prompts import Prompt
from latent_rl.decode.settings import DecodeSettings, Steering
from latent_rl.decode.stopping import StopStrings
from latent_rl.decode.workspace import Workspace
from latent_rl.models import LatentActionModel
from latent_rl.ops.ranges import phase

__all__ = ["DecodeRun", "Job"]

# What a malformed image or prompt makes a model raise.
_PROMPT_ERRORS = (ValueError, TypeError, RuntimeError, IndexError, KeyError)


@dataclass(frozen=True)
class Job:
    """A checked call of ``Decoder.start``; see there."""

    prompts: list[Prompt]
    num_generations: int
    limits: list[int]
    seeds: Tensor
    settings: DecodeSettings
    steering: Steering
    hidden_dtype: torch.dtype | None
    prefill_prompts: int

    @property
    def longest_prompt(self) -> int:
        """P."""
        return max(int(p["input_ids"].shape[1]) for p in self.prompts)


@dataclass
class _Slot:
    """The host's knowledge of a speaking slot: at least this many tokens are said."""

    request: int
    prompt_tokens: int
    said: int = 0
    looked: int = 0
    streamed: int = 0

    @property
    def own(self) -> int:
        """Positions cached besides the prompt's, at most: the last token said is not read yet."""
        return self.said - 1

    @property
    def cached(self) -> int:
        """Positions cached, at most."""
        return self.prompt_tokens + self.own


class DecodeRun:
    """Iterate for pieces as they come, or :meth:`finish`; :meth:`output` at any time."""

    def __init__(
        self, model: LatentActionModel, space: Workspace, job: Job, *, tokenizer: Any | None
    ) -> None:
        """Nothing runs before the first piece is asked for."""
        self._model, self._space, self._job = model, space, job
        self._slots: list[_Slot] = []
        self._prefills: dict[int, Prefill] = {}
        # Of prompts in use: their place in the storage, and how many requests still need it.
        self._places: dict[int, int] = {}
        self._needed: dict[int, int] = {}
        self._free_places = list(range(space.layout.prompts))
        self._queue = deque(range(len(job.limits)))
        self._stop = StopStrings(job.settings.stop_strings, tokenizer)
        self._errors: dict[int, Exception] = {}
        self._started = False
        # Without a listener only what ends is looked at.
        self._streams = True
        width = int(model.decoder.config.hidden_size)
        hidden = None
        if job.hidden_dtype is not None:
            hidden = (job.longest_prompt, width, job.hidden_dtype)
        self._results = Results.empty(
            len(job.limits), max(job.limits), hidden=hidden, device=model.device
        )
        # Of every prompt read: positions and masks for replay.
        self._read: dict[int, Prefill] = {}

    def finish(self) -> DecodeOutput:
        """Decode what is left and return everything.

        Raises:
            DecodeError: when prompts could not be read; its ``output`` has the others.
        """
        if not self._started:
            self._streams = False
            for _ in self:
                pass
        output = self.output()
        if self._errors:
            raise DecodeError(self._errors, output)
        return output

    def output(self) -> DecodeOutput:
        """What was finished so far; other rows are masked and "unfinished" or "failed"."""
        return collect(self._model, self._job, self._results, self._read)

    def __iter__(self) -> Iterator[Piece]:
        """Decode; yields pieces in the order in which they are said.

        Raises:
            RuntimeError: when the run was iterated before.
        """
        if self._started:
            raise RuntimeError("DecodeRun: a run can be iterated once; start another")
        self._started = True
        model, space = self._model, self._space
        was_training = model.training
        model.eval()
        space.begin(model)
        try:
            yield from self._decode()
        finally:
            self._prefills.clear()
            model.train(was_training)

    def _decode(self) -> Iterator[Piece]:
        while self._queue or self._slots:
            # Left before a piece is handed out: what its receiver does is not ours to change.
            with phase("decode"), torch.no_grad():
                self._admit()
                pieces = self._speak()
            yield from pieces

    def _speak(self) -> list[Piece]:
        """Step until there is something to hand out, or a free slot for the queue, or the end."""
        attention = attention_of(self._model.decoder, self._model.latent.policy.tower)
        with attention, self._space.weights():
            self._space.settle()
            # A first token may have been a last one.
            pieces = self._look()
            while self._slots and not pieces and not self._can_admit:
                for _ in range(self._space.check_every):
                    if all(slot.said >= self._job.limits[slot.request] for slot in self._slots):
                        break
                    self._advance()
                pieces = self._look()
        return pieces

    @property
    def _can_admit(self) -> bool:
        if not (self._queue and self._free_slots):
            return False
        return (
            bool(self._free_places) or self._queue[0] // self._job.num_generations in self._places
        )

    @property
    def _free_slots(self) -> int:
        return self._space.slots - len(self._slots)

    # Slots are filled ...

    def _admit(self) -> None:
        """Fill free slots from the queue; a prompt is read when its first request comes."""
        group = self._job.num_generations
        fresh: list[tuple[Prefill, list[int]]] = []
        free = self._free_slots
        while self._queue and free:
            prompt = self._queue[0] // group
            if prompt not in self._prefills:
                if not self._free_places:
                    break
                self._read_prompts(self._next_prompts(free))
                continue
            requests: list[int] = []
            while self._queue and self._queue[0] // group == prompt and len(requests) < free:
                requests.append(self._queue.popleft())
            fresh.append((self._prefills[prompt], requests))
            free -= len(requests)
            if not self._queue or self._queue[0] // group != prompt:
                del self._prefills[prompt]
        if fresh:
            self._place(fresh)

    def _next_prompts(self, free: int) -> list[int]:
        """Prompts to read together: those whose requests fit the free slots, but few at once."""
        group = self._job.num_generations
        found: list[int] = []
        for request in itertools.islice(self._queue, free):
            prompt = request // group
            if prompt not in self._prefills and prompt not in found:
                found.append(prompt)
        return found[: min(self._job.prefill_prompts, len(self._free_places))]

    def _read_prompts(self, prompts: list[int]) -> None:
        """Read them in one batch; when that fails, one by one, to find who is to blame."""
        given = [self._job.prompts[prompt] for prompt in prompts]
        try:
            with phase("prefill"):
                found = prefill(self._model, given, pad_id(self._model))
        except torch.OutOfMemoryError:
            raise
        except _PROMPT_ERRORS as error:
            if len(prompts) > 1:
                for prompt in prompts:
                    self._read_prompts([prompt])
            else:
                self._fail(prompts[0], error)
            return
        for prompt, read in zip(prompts, found, strict=True):
            self._keep(prompt, read)

    def _keep(self, prompt: int, read: Prefill) -> None:
        self._space.use_positions(read.positions.shape[0])
        self._places[prompt] = self._free_places.pop()
        self._needed[prompt] = self._job.num_generations
        self._space.load_prompt(read, self._places[prompt])
        self._prefills[prompt] = self._read[prompt] = read.without_cache()
        if self._results.hidden is not None:
            group = self._job.num_generations
            rows = slice(prompt * group, (prompt + 1) * group)
            end = self._job.longest_prompt
            self._results.hidden[rows, end - read.length : end] = read.hidden.to(
                self._results.hidden.dtype
            )

    def _fail(self, prompt: int, error: Exception) -> None:
        """Drop a prompt's requests and remember why."""
        group = self._job.num_generations
        failed = [request for request in self._queue if request // group == prompt]
        self._queue = deque(request for request in self._queue if request // group != prompt)
        for request in failed:
            self._errors[request] = error
            self._results.reasons[request] = "failed"

    def _place(self, fresh: list[tuple[Prefill, list[int]]]) -> None:
        """Give requests, by their prompts, the next slots, and let them say their first token."""
        space, job, rows = self._space, self._job, self._space.rows
        requests = [request for _, some in fresh for request in some]
        reads = [read for read, some in fresh for _ in some]
        at = slice(len(self._slots), len(self._slots) + len(requests))
        device = space.device
        chosen = torch.tensor(requests, device=device)
        places = [self._places[request // job.num_generations] for request in requests]
        rows.lengths[at] = rows.shared[at] = torch.tensor([r.length for r in reads], device=device)
        rows.shared_at[at] = torch.tensor(
            [space.layout.prompt_at(place) for place in places], device=device
        )
        kinds = rows.positions.shape[0]
        last = [read.positions[:, 0, -1:].expand(kinds, -1) for read in reads]
        rows.positions[:, at] = torch.cat(last, 1) + 1
        rows.steps[at] = 0
        rows.limits[at] = torch.tensor([job.limits[r] for r in requests], device=device)
        rows.seeds[at] = job.seeds[chosen]
        rows.text_only[at] = torch.cat([read.text_only for read in reads])
        rows.active[at] = True
        if job.steering.allowed is not None:
            rows.allowed[:, at] = job.steering.allowed[chosen].T
        space.requests[at] = chosen
        self._slots += [
            _Slot(request, read.length) for request, read in zip(requests, reads, strict=True)
        ]
        self._steer(at)
        logits = [read.policy_logits for read in reads if read.policy_logits is not None]
        self._step().act(
            at,
            torch.cat([read.state for read in reads]),
            torch.cat(logits) if logits else None,
            reads[0].hidden.dtype,
        )
        self._results.record(space.said, space.requests[at], at, decoded=False, idle=False)
        for slot in self._slots[at]:
            slot.said = 1

    # ... advanced ...

    def _step(self) -> Any:
        job = self._job
        return self._space.step_of(
            self._model,
            job.settings,
            forced=job.steering.forced is not None,
            allowed=job.steering.allowed is not None,
        )

    def _steer(self, at: slice) -> None:
        """Put the forced codes of the slots' next step in their place."""
        forced = self._job.steering.forced
        if forced is not None:
            rows = self._space.rows
            steps = rows.steps[at].clamp_max(forced.shape[1] - 1)
            rows.forced[at] = forced[self._space.requests[at], steps]

    def _advance(self) -> None:
        space, n = self._space, len(self._slots)
        at = slice(0, n)
        self._steer(at)
        longest = max(slot.cached for slot in self._slots)
        space.advance(self._step(), n, longest)
        # Where every step is looked at, the slots that ended are gone.
        self._results.record(
            space.said, space.requests[at], at, decoded=True, idle=space.check_every > 1
        )
        for slot in self._slots:
            # An ended slot no longer advances; its host count may run ahead until the next look.
            slot.said = min(slot.said + 1, self._job.limits[slot.request])

    # ... and emptied.

    def _look(self) -> list[Piece]:
        """Find the slots that ended; free them; report what is new."""
        rows, n = self._space.rows, len(self._slots)
        quiet = not (self._streams or self._stop)
        if quiet and bool(rows.active[:n].all()):
            return []
        said, active = torch.stack((rows.steps[:n], rows.active[:n])).tolist()
        pieces = []
        for index in reversed(range(n)):
            slot = self._slots[index]
            length = self._stop.cut(self._results, slot.request, slot.looked, said[index])
            slot.looked = length
            reason = self._reason(slot, said[index], bool(active[index]), length)
            if self._streams:
                pieces.append(self._piece(slot, length, reason))
            if reason is not None:
                self._free(index, length, reason)
        return [piece for piece in reversed(pieces) if piece.tokens or piece.finish_reason]

    def _reason(self, slot: _Slot, said: int, active: bool, length: int) -> str | None:
        if self._stop.matched:
            return "stop_string"
        if active:
            return None
        last = int(self._results.ids[slot.request, said - 1, 0])
        return "stop" if last in self._job.settings.eos_token_ids else "length"

    def _piece(self, slot: _Slot, length: int, reason: str | None) -> Piece:
        new = self._results.ids[slot.request, slot.streamed : length].tolist()
        slot.streamed = length
        tokens, codes = zip(*new, strict=True) if new else ((), ())
        return Piece(slot.request, tokens, codes, reason)

    def _free(self, index: int, length: int, reason: str) -> None:
        """Write the request off and close the gap with the last slot."""
        slot, last = self._slots[index], len(self._slots) - 1
        self._results.lengths[slot.request] = length
        self._results.reasons[slot.request] = reason
        prompt = slot.request // self._job.num_generations
        self._needed[prompt] -= 1
        if not self._needed[prompt]:
            self._free_places.append(self._places.pop(prompt))
        if index != last:
            self._space.move(last, index, self._slots[last].own)
            self._slots[index] = self._slots[last]
        self._slots.pop()
        self._space.rows.active[last] = False
