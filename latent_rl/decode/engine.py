"""The decoding engine: many requests over few slots, one step at a time for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from latent_rl.decode.memory import DecodePlan, make_plan
from latent_rl.decode.output import DecodeOutput
from latent_rl.decode.prompts import Inputs, split_prompts
from latent_rl.decode.run import DecodeRun, Job
from latent_rl.decode.settings import DecodeSettings, Steering, seeds_of
from latent_rl.decode.slot_cache import SlotLayout
from latent_rl.decode.workspace import Workspace
from latent_rl.models import LatentActionModel
from latent_rl.models import backbone as bb

__all__ = ["Decoder"]

# Prompts held at once, over those that fill the slots.
_OVERLAP = 3
# Places for prompts are this long, or a multiple of it.
_PROMPT_STEP = 32


class Decoder:
    """Batched latent decoding with static caches, refilled slots and shared prompts.

    A prompt is read once and alone; its completions take slots of a static key-value cache. Every
    step advances all slots that speak by one token: trunk, policy, code, merge, head and token
    choice in one go, as one CUDA graph where there is CUDA. A slot that ends is refilled from the
    queue. The output is that of ``LatentActionModel.generate``: the same tokens and codes for the
    same seeds, whatever stands in the other slots.

    Attributes:
        model: the latent-action model, unwrapped.
        last_run: the latest run; after an exception its ``output()`` has what was finished.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slots: int = 64,
        tokenizer: Any | None = None,
        hidden_dtype: torch.dtype | None = None,
        cuda_graphs: bool | None = None,
        check_every: int | None = None,
        prefill_prompts: int | None = None,
        compile: bool = False,  # noqa: A002
    ) -> None:
        """Nothing is allocated before the first call.

        Args:
            model: a :class:`LatentActionModel`, also inside DDP or another wrapper with
                ``.module``; its backbone may be PEFT-wrapped. Weights may change between calls.
            slots: requests decoded at once, at most.
            tokenizer: needed for stop strings alone.
            hidden_dtype: of the states kept for replay; default the trunk's.
            cuda_graphs: capture the step; default on CUDA devices. True elsewhere raises.
            check_every: steps between looks at which slots ended; default 1 on the CPU, where
                looking is free, and 8 on CUDA, where it costs a wait.
            prefill_prompts: prompts read in one batch, at most; by default as many as may hold a
                quarter of the caches' bytes (64 MiB where that is more) while they are read: see
                :meth:`plan`.
            compile: run the step through ``torch.compile``; pays off from a few hundred steps on.

        Raises:
            TypeError: for a model of another kind.
            ValueError: for options out of range.
        """
        while isinstance(getattr(model, "module", None), nn.Module):
            model = cast(nn.Module, model.module)
        if not isinstance(model, LatentActionModel):
            raise TypeError(
                f"Decoder: model must be a LatentActionModel, got {type(model).__name__}"
            )
        if slots < 1:
            raise ValueError(f"Decoder: slots must be >= 1, got {slots}")
        if check_every is not None and check_every < 1:
            raise ValueError(f"Decoder: check_every must be >= 1, got {check_every}")
        if prefill_prompts is not None and prefill_prompts < 1:
            raise ValueError(f"Decoder: prefill_prompts must be >= 1, got {prefill_prompts}")
        self.model = model
        self.slots = slots
        self.tokenizer = tokenizer
        self.hidden_dtype = hidden_dtype
        self.last_run: DecodeRun | None = None
        self._cuda_graphs, self._check_every = cuda_graphs, check_every
        self._prefill_prompts, self._compile = prefill_prompts, compile
        self._workspace: Workspace | None = None

    def generate(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int | Sequence[int],
        num_generations: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | Tensor = 0,
        do_sample_tokens: bool = False,
        min_new_tokens: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        suppress_tokens: Sequence[int] = (),
        forced_codes: int | Tensor | None = None,
        allowed_codes: Sequence[int] | Tensor | None = None,
        return_hidden: bool = False,
    ) -> DecodeOutput:
        """Decode to the end; arguments and errors as :meth:`start`.

        Raises:
            DecodeError: when prompts could not be read, after all others are done; its ``output``
                has those.
        """
        return self.start(
            inputs,
            max_new_tokens=max_new_tokens,
            num_generations=num_generations,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            do_sample_tokens=do_sample_tokens,
            min_new_tokens=min_new_tokens,
            eos_token_id=eos_token_id,
            stop_strings=stop_strings,
            suppress_tokens=suppress_tokens,
            forced_codes=forced_codes,
            allowed_codes=allowed_codes,
            return_hidden=return_hidden,
        ).finish()

    def start(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int | Sequence[int],
        num_generations: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | Tensor = 0,
        do_sample_tokens: bool = False,
        min_new_tokens: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        suppress_tokens: Sequence[int] = (),
        forced_codes: int | Tensor | None = None,
        allowed_codes: Sequence[int] | Tensor | None = None,
        return_hidden: bool = False,
    ) -> DecodeRun:
        """Check a call and queue its requests; iterating over the run decodes and streams.

        R = prompts x num_generations requests; a prompt's generations are consecutive.

        Args:
            inputs: what the processor made: a batch (padded on either side), or a sequence of
                such for single prompts.
            max_new_tokens: T, for all requests or one per request.
            num_generations: G completions per prompt; the prompt is read once.
            temperature: of the codes; 0 takes the most likely.
            top_k: codes to keep, 0 for all.
            top_p: mass of codes to keep.
            min_p: least probability of a code, relative to the most likely.
            seed: int (expanded to one per request as ``ops.row_seeds``), or int64 [R].
            do_sample_tokens: sample tokens at temperature 1 as well, from the same seeds.
            min_new_tokens: no end before.
            eos_token_id: default the generation configuration's.
            stop_strings: texts that end a request.
            suppress_tokens: token ids never said, besides image placeholders.
            forced_codes: one code for every step, or int64 [R, >= T]; -1 lets the policy choose.
            allowed_codes: ids of the codes to choose from, or bool [K] or [R, K]. The full
                log-probability is then under the softmax over the allowed ones.
            return_hidden: keep the states for replay, see ``LatentGeneration.trace``.

        Raises:
            TypeError, ValueError: naming the argument.
            MemoryError: when it would not fit the device, saying what to lower.
        """
        model = self.model
        prompts = split_prompts(model.config, inputs)
        for prompt in prompts:
            bb.check_inputs(model.backbone, prompt)
        if num_generations < 1:
            raise ValueError(f"Decoder: num_generations must be >= 1, got {num_generations}")
        requests = len(prompts) * num_generations
        limits = _limits(max_new_tokens, requests)
        if stop_strings and self.tokenizer is None:
            raise ValueError("Decoder: stop_strings need a tokenizer; give one to Decoder()")
        suppressed = set(suppress_tokens)
        if model.is_active:
            suppressed |= set(bb.suppressed_token_ids(model.config))
        settings = DecodeSettings(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            do_sample_tokens=do_sample_tokens,
            min_new_tokens=min_new_tokens,
            eos_token_ids=_end_ids(model, eos_token_id),
            stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
            suppress_tokens=tuple(sorted(suppressed)),
        )
        steering = Steering.of(
            forced_codes,
            allowed_codes,
            requests=requests,
            steps=max(limits),
            num_codes=model.latent_config.num_codes,
            device=model.device,
        )
        longest = max(int(prompt["input_ids"].shape[1]) for prompt in prompts)
        plan = self.plan(
            requests=requests,
            prompt_tokens=longest,
            new_tokens=max(limits),
            num_generations=num_generations,
            return_hidden=return_hidden,
        )
        plan.check(model.device, held=self._workspace.num_bytes if self._workspace else 0)
        job = Job(
            prompts=prompts,
            num_generations=num_generations,
            limits=limits,
            seeds=seeds_of(seed, requests, model.device),
            settings=settings,
            steering=steering,
            hidden_dtype=(self.hidden_dtype or model.dtype) if return_hidden else None,
            prefill_prompts=plan.prefill_prompts,
        )
        workspace = self._space(self._layout(requests, longest, max(limits), num_generations))
        self.last_run = DecodeRun(model, workspace, job, tokenizer=self.tokenizer)
        return self.last_run

    def plan(
        self,
        *,
        requests: int,
        prompt_tokens: int,
        new_tokens: int,
        num_generations: int = 1,
        return_hidden: bool = False,
    ) -> DecodePlan:
        """Bytes that a call will hold, before anything is allocated.

        Args:
            requests: R.
            prompt_tokens: of the longest prompt.
            new_tokens: T at most.
            num_generations: G, of R, that share a prompt.
            return_hidden: keep the states.
        """
        return make_plan(
            self.model,
            layout=self._layout(requests, prompt_tokens, new_tokens, num_generations),
            requests=requests,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            hidden_dtype=(self.hidden_dtype or self.model.dtype) if return_hidden else None,
            prefill_prompts=self._prefill_prompts,
        )

    def release(self) -> None:
        """Free the caches and graphs; the next call allocates them anew."""
        self._workspace = None

    def _layout(
        self, requests: int, prompt_tokens: int, new_tokens: int, num_generations: int
    ) -> SlotLayout:
        slots = min(self.slots, requests)
        prompts = -(-requests // num_generations)
        # Slots are refilled one by one, so that prompts overlap; completions that outlive theirs
        # by far may make the queue wait.
        held = 1 + _OVERLAP * -(-slots // num_generations)
        # In steps, so that a slightly longer prompt needs no new storage and no new step.
        length = -(-prompt_tokens // _PROMPT_STEP) * _PROMPT_STEP
        return SlotLayout(min(prompts, slots, held), length, slots, new_tokens)

    def _space(self, layout: SlotLayout) -> Workspace:
        """The workspace, made anew when it is too small or of another device or dtype."""
        model, space = self.model, self._workspace
        if space is None or not space.serves(model, layout):
            self._workspace = None  # Free the old one first.
            self._workspace = Workspace(
                model,
                layout,
                cuda_graphs=self._cuda_graphs,
                check_every=self._check_every,
                compiled=self._compile,
            )
        return cast(Workspace, self._workspace)


def _limits(max_new_tokens: int | Sequence[int], requests: int) -> list[int]:
    limits = [max_new_tokens] * requests if isinstance(max_new_tokens, int) else [*max_new_tokens]
    if len(limits) != requests:
        raise ValueError(
            f"Decoder: max_new_tokens must be an int or one per request ({requests}), "
            f"got {len(limits)}"
        )
    if min(limits, default=0) < 1:
        raise ValueError(f"Decoder: max_new_tokens must be >= 1, got {min(limits, default=0)}")
    return limits


def _end_ids(model: LatentActionModel, given: int | Sequence[int] | None) -> tuple[int, ...]:
    ids = model.generation_config.eos_token_id if given is None else given
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(int(i) for i in ids)
