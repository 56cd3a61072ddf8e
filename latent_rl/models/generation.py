"""Generation: the backbone's own ``generate`` with a code between trunk and vocabulary head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from latent_rl import ops
from latent_rl.models import backbone as bb
from latent_rl.models.hooks import tower_kwargs
from latent_rl.models.trace import Trace

if TYPE_CHECKING:
    from latent_rl.models.latent_action_model import LatentActionModel

# Parts the token stream from the code stream of the same row seeds.
TOKEN_STREAM = 0x746F6B656E


class LatentGeneration(NamedTuple):
    """Completions and the actions behind them.

    Attributes:
        sequences: int64 [B, P + T].
        prompt_length: P; the action at position P - 1 explains completion token 0.
        completion_ids: int64 [B, T].
        completion_mask: bool [B, T], True up to and including the first end-of-sequence token.
        codes: int64 [B, T]; -1 where masked.
        logprobs: [B, T] under the distribution sampled from; 0 where masked.
        logprobs_full: [B, T] under the policy's untempered softmax; 0 where masked.
        entropies: [B, T] nats, of the distribution sampled from; 0 where masked.
        trace: states of positions 0 .. P+T-2 (the last token is emitted, never read), or None.
    """

    sequences: Tensor
    prompt_length: int
    completion_ids: Tensor
    completion_mask: Tensor
    codes: Tensor
    logprobs: Tensor
    logprobs_full: Tensor
    entropies: Tensor
    trace: Trace | None


class Choice(NamedTuple):
    """One step's codes and their numbers, all [B]."""

    codes: Tensor
    logprob: Tensor
    logprob_full: Tensor
    entropy: Tensor


class CodeChooser(Protocol):
    """Who picks the codes of a step."""

    def choose(self, logits: Tensor, seeds: Tensor, step: int) -> Choice:
        """Codes for policy logits [B, K], int64 row seeds [B] and the step's number."""
        ...


@dataclass(frozen=True)
class CodeSampling:
    """Sample from the policy, truncated and tempered."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def choose(self, logits: Tensor, seeds: Tensor, step: int) -> Choice:
        """See :class:`CodeChooser`; the step is the random stream's offset."""
        out = ops.sample_codes(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seeds,
            offset=step,
        )
        return Choice(out.codes, out.logprob, out.logprob_full, out.entropy)


@dataclass(frozen=True)
class ForcedCodes:
    """Steering: take the codes given; where they are -1 another chooser decides.

    Attributes:
        codes: int64 [B, T].
        otherwise: who decides where a code is -1.
    """

    codes: Tensor
    otherwise: CodeChooser

    def choose(self, logits: Tensor, seeds: Tensor, step: int) -> Choice:
        """See :class:`CodeChooser`; a forced code's log-probability is the policy's own."""
        choice = self.otherwise.choose(logits, seeds, step)
        # Deferred stop checks may run steps past the last; they are cut off afterwards.
        forced = self.codes[:, min(step, self.codes.shape[1] - 1)]
        scored = ops.code_logprobs(logits, forced.clamp_min(0))
        given = forced >= 0
        return Choice(
            torch.where(given, forced, choice.codes),
            torch.where(given, scored.logprob, choice.logprob),
            torch.where(given, scored.logprob, choice.logprob_full),
            torch.where(given, scored.entropy, choice.entropy),
        )


def make_chooser(
    num_codes: int,
    sampling: CodeSampling,
    forced: int | Tensor | None,
    steps: int,
    input_ids: Tensor,
) -> CodeChooser:
    """The policy, or forced codes on top of it.

    Raises:
        TypeError: for forced codes that are no integers.
        ValueError: for codes outside [-1, K) or a shape other than [B, >= steps].
    """
    if forced is None:
        return sampling
    batch = input_ids.shape[0]
    if isinstance(forced, Tensor):
        if forced.dtype.is_floating_point or forced.dtype == torch.bool:
            raise TypeError(f"generate: forced_codes must be integers, got {forced.dtype}")
        if forced.ndim != 2 or forced.shape[0] != batch or forced.shape[1] < steps:
            raise ValueError(
                f"generate: forced_codes must be [{batch}, >= {steps}], got {list(forced.shape)}"
            )
        codes = forced.to(device=input_ids.device, dtype=torch.int64)
    else:
        codes = torch.full((batch, max(1, steps)), int(forced), device=input_ids.device)
    if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) >= num_codes):
        raise ValueError(f"generate: forced_codes must be in [-1, {num_codes})")
    return ForcedCodes(codes, sampling)


def expand_seeds(seed: int | Tensor, input_ids: Tensor) -> Tensor:
    """int64 [B]: a tensor [B] as it is, one number as ``ops.row_seeds``.

    Raises:
        ValueError: for a tensor of another shape.
    """
    batch = input_ids.shape[0]
    if isinstance(seed, Tensor) and seed.ndim:
        if seed.shape != (batch,):
            raise ValueError(f"generate: seed must be an int or [{batch}], got {list(seed.shape)}")
        return seed.to(device=input_ids.device, dtype=torch.int64)
    return ops.row_seeds(int(seed), batch, input_ids.device)


@dataclass(frozen=True)
class Request:
    """A checked call of ``LatentActionModel.generate``; see there for the fields."""

    max_new_tokens: int
    chooser: CodeChooser
    seeds: Tensor
    do_sample_tokens: bool
    return_hidden: bool
    generation_kwargs: dict[str, Any]


class ActWithPolicy:
    """Interceptor: at every step, pick a code from the last state and merge it in.

    The policy's key-value layers are appended to the very cache ``generate`` made, so whatever
    happens to that cache (static shapes, cropping, resetting) happens to both.
    """

    def __init__(self, model: LatentActionModel, text_only: Tensor, request: Request) -> None:
        """``text_only`` [B] is remembered: later steps see no prompt to look at."""
        self._model, self._text_only, self._request = model, text_only, request
        self._decoder_layers = int(model.decoder.config.num_hidden_layers)
        self.choices: list[Choice] = []
        self.hidden: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []

    def intercept(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Replace the last position of [B, L, H] (L = P at the first call, then 1)."""
        model, request = self._model, self._request
        given = tower_kwargs(kwargs)
        state = model.project(hidden, self._text_only)
        logits = model.latent.policy(
            state, given, past_key_values=self._cache(kwargs["past_key_values"]), last_only=True
        )
        choice = request.chooser.choose(logits[:, 0], request.seeds, len(self.choices))
        self.choices.append(choice)
        if request.return_hidden:
            self.hidden.append(hidden)
            self.kwargs.append(given)
        merged = model.merge(state[:, -1], choice.codes).to(hidden.dtype)
        return torch.cat([hidden[:, :-1], merged[:, None]], dim=1)

    def _cache(self, cache: Cache) -> Cache:
        n = self._decoder_layers
        if len(cache.layers) <= n:
            config = cast(Any, self._model.latent.policy.tower).config
            extra: Cache
            if isinstance(cache, StaticCache):
                # Sliding layers are shorter than the longest full one.
                length = max(cast(Any, layer).max_cache_len for layer in cache.layers)
                extra = StaticCache(config=config, max_cache_len=length)
            else:
                extra = DynamicCache(config=config)
            cache.layers.extend(extra.layers)
        return Cache(layers=cache.layers[n:])


class SeededTokens(LogitsProcessor):
    """Sample tokens from the row seeds: leaves only the drawn token, so that greedy takes it."""

    def __init__(self, seeds: Tensor, prompt_length: int) -> None:
        """Seeds int64 [B]; the step is read off the length of the sequences."""
        self._seeds, self._prompt_length = seeds ^ TOKEN_STREAM, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] with -inf everywhere but at the drawn token."""
        step = input_ids.shape[1] - self._prompt_length
        tokens = ops.sample_tokens(scores, seed=self._seeds, offset=step)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, tokens[:, None], 0.0)


def generate(
    model: LatentActionModel, inputs: Mapping[str, Tensor], request: Request
) -> LatentGeneration:
    """Run a checked request; see ``LatentActionModel.generate``."""
    _check(model, inputs, request)
    ids = inputs["input_ids"]
    actor = ActWithPolicy(model, model.text_only(ids), request)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model._hook.use(actor if model.is_active else None):
            sequences = _run(model, inputs, request)
        return _collect(model, inputs, request, actor, sequences)
    finally:
        model.train(was_training)


def _check(model: LatentActionModel, inputs: Mapping[str, Tensor], request: Request) -> None:
    bb.check_inputs(model.backbone, inputs)
    if request.max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be >= 1, got {request.max_new_tokens}")
    if not bool(bb.prompt_mask(inputs)[:, -1].all()):
        raise ValueError("generate: prompts must be padded on the left, got right padding")
    for name in ("num_beams", "num_return_sequences"):
        if request.generation_kwargs.get(name, 1) != 1:
            raise ValueError(f"generate: {name} must be 1; repeat the prompts instead")
    taken = {"max_new_tokens", "do_sample", "logits_processor", "use_cache", *inputs}
    clash = sorted(taken & set(request.generation_kwargs))
    if clash:
        raise ValueError(f"generate: generation_kwargs must not have {', '.join(clash)}")


def _run(model: LatentActionModel, inputs: Mapping[str, Tensor], request: Request) -> Tensor:
    kwargs = dict(request.generation_kwargs)
    suppressed = set(kwargs.pop("suppress_tokens", None) or ())
    if model.is_active:
        suppressed |= set(bb.suppressed_token_ids(model.config))
    processors = LogitsProcessorList()
    if request.do_sample_tokens:
        processors.append(SeededTokens(request.seeds, inputs["input_ids"].shape[1]))
    # The codes are picked in Python between trunk and head, which a compiled forward would
    # freeze; the decoding engine captures the whole step instead.
    kwargs.setdefault("disable_compile", True)
    out = cast(Any, model.backbone).generate(
        **inputs,
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        suppress_tokens=sorted(suppressed) or None,
        logits_processor=processors,
        use_cache=True,
        return_dict_in_generate=False,
        **kwargs,
    )
    return cast(Tensor, out)


def _collect(
    model: LatentActionModel,
    inputs: Mapping[str, Tensor],
    request: Request,
    actor: ActWithPolicy,
    sequences: Tensor,
) -> LatentGeneration:
    prompt_length = inputs["input_ids"].shape[1]
    completion = sequences[:, prompt_length:]
    mask = completion_mask(completion, _eos_ids(model, request))
    steps = completion.shape[1]
    if actor.choices:
        columns = zip(*actor.choices, strict=True)
        codes, logprob, logprob_full, entropy = (
            torch.stack(column, dim=1)[:, :steps] for column in columns
        )
    else:
        codes = torch.full_like(completion, -1)
        logprob = logprob_full = entropy = torch.zeros(completion.shape, device=completion.device)
    trace = None
    if request.return_hidden:
        trace = _trace(model, inputs, actor, completion, mask)
    return LatentGeneration(
        sequences=sequences,
        prompt_length=prompt_length,
        completion_ids=completion,
        completion_mask=mask,
        codes=codes.masked_fill(~mask, -1),
        logprobs=logprob.masked_fill(~mask, 0.0),
        logprobs_full=logprob_full.masked_fill(~mask, 0.0),
        entropies=entropy.masked_fill(~mask, 0.0),
        trace=trace,
    )


def completion_mask(completion_ids: Tensor, eos_ids: list[int]) -> Tensor:
    """bool [B, T]: True up to and including the first end-of-sequence token."""
    eos = torch.tensor(eos_ids, device=completion_ids.device, dtype=completion_ids.dtype)
    ended = torch.isin(completion_ids, eos).long()
    return ended.cumsum(1) - ended == 0


def _eos_ids(model: LatentActionModel, request: Request) -> list[int]:
    config = request.generation_kwargs.get("generation_config") or model.generation_config
    eos = request.generation_kwargs.get("eos_token_id", config.eos_token_id)
    if eos is None:
        return []
    return [int(i) for i in eos] if isinstance(eos, (list, tuple)) else [int(eos)]


def _trace(
    model: LatentActionModel,
    inputs: Mapping[str, Tensor],
    actor: ActWithPolicy,
    completion: Tensor,
    mask: Tensor,
) -> Trace:
    """States of positions 0 .. P+T-2: the rollout's own where its kwargs can be joined.

    They can where the decoder saw a plain [B, L] mask and positions of its own length. Otherwise
    (Gemma3's masks by layer type, static caches' 4D masks) the whole sequence is encoded once.
    """
    read = completion.shape[1] - 1
    keep = torch.cat([bb.prompt_mask(inputs), mask[:, :read]], dim=1)
    positions = _joined_positions(actor.hidden, actor.kwargs)
    if positions is None:
        full = bb.extend_inputs(inputs, completion[:, :read], mask[:, :read])
        return model.encode(full)
    length = keep.shape[1]
    kwargs = {"attention_mask": keep.long(), "position_ids": positions[..., :length]}
    hidden = torch.cat(actor.hidden, dim=1)[:, :length]
    return Trace(hidden, kwargs, keep, model.text_only(inputs["input_ids"]))


def _joined_positions(hidden: list[Tensor], kwargs: list[dict[str, Any]]) -> Tensor | None:
    positions = []
    for states, given in zip(hidden, kwargs, strict=True):
        mask, position = given.get("attention_mask"), given.get("position_ids")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or not isinstance(position, Tensor):
            return None
        if position.shape[-1] != states.shape[1] or position.shape[-2] != states.shape[0]:
            return None
        positions.append(position)
    return torch.cat(positions, dim=-1) if positions else None
