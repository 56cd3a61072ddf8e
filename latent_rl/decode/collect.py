"""From the engine's buffers to a ``LatentGeneration``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latent_rl.decode.output import DecodeOutput, Results
from latent_rl.decode.prefill import Prefill
from latent_rl.models import LatentActionModel, LatentGeneration, Trace

if TYPE_CHECKING:
    from latent_rl.decode.run import Job

__all__ = ["collect", "pad_id"]


def collect(
    model: LatentActionModel, job: Job, results: Results, read: Mapping[int, Prefill]
) -> DecodeOutput:
    """Finished rows as they are; all others masked."""
    device = results.ids.device
    lengths = torch.tensor(results.lengths, device=device)
    steps = max(1, max(results.lengths))
    requests = len(results.lengths)
    mask = torch.arange(steps, device=device) < lengths[:, None]
    ids = results.ids[:requests, :steps]
    numbers = results.numbers[:requests, :steps].masked_fill(~mask[..., None], 0.0)
    prompt_ids, prompt_mask = _prompts(model, job, device)
    completion = ids[..., 0].masked_fill(~mask, pad_id(model))
    trace = None
    if results.hidden is not None:
        trace = _trace(job, results, read, torch.cat([prompt_mask, mask[:, :-1]], 1), steps)
    generation = LatentGeneration(
        sequences=torch.cat([prompt_ids, completion], 1),
        prompt_length=prompt_ids.shape[1],
        completion_ids=completion,
        completion_mask=mask,
        codes=ids[..., 1].masked_fill(~mask, -1),
        logprobs=numbers[..., 0],
        logprobs_full=numbers[..., 1],
        entropies=numbers[..., 2],
        trace=trace,
    )
    return DecodeOutput(generation, tuple(results.reasons))


def pad_id(model: LatentActionModel) -> int:
    """The padding token, else an end-of-sequence token, else 0."""
    config = model.generation_config
    pad, end = config.pad_token_id, config.eos_token_id
    if pad is None:
        pad = end[0] if isinstance(end, (list, tuple)) else end
    return 0 if pad is None else int(pad)


def _prompts(model: LatentActionModel, job: Job, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded prompts of all requests: ids and True at real tokens, both [R, P]."""
    longest = job.longest_prompt
    shape = (len(job.prompts), longest)
    ids = torch.full(shape, pad_id(model), dtype=torch.int64, device=device)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for row, prompt in enumerate(job.prompts):
        tokens = prompt["input_ids"][0]
        ids[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = True
    group = job.num_generations
    return ids.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)


def _trace(
    job: Job, results: Results, read: Mapping[int, Prefill], keep_mask: Tensor, steps: int
) -> Trace:
    """States of positions 0 .. P+T-2, the buffer itself, with what a tower needs to read them."""
    hidden = results.hidden
    if hidden is None or not read:
        raise RuntimeError("Decoder: no prompt was read, so there is no trace")
    requests, length = keep_mask.shape
    group, new = job.num_generations, steps - 1
    known = next(iter(read.values()))
    # A prompt of text alone may have one rotary position per token where images have three.
    most = max(prefill.positions.shape[0] for prefill in read.values())
    positions = torch.zeros(most, requests, length, dtype=torch.int64, device=keep_mask.device)
    text_only = torch.zeros(requests, dtype=torch.bool, device=keep_mask.device)
    for prompt, prefill in read.items():
        rows = slice(prompt * group, (prompt + 1) * group)
        end = length - new
        given = prefill.positions
        positions[:, rows, end - prefill.length : end] = given
        after = torch.arange(1, new + 1, device=keep_mask.device)
        positions[:, rows, end:] = given[:, :, -1:] + after
        text_only[rows] = prefill.text_only
    mask: Any = keep_mask.long()
    if known.masks is not None:
        mask = {kind: _grown_mask(kind, job, read, keep_mask, new) for kind in known.masks}
    kwargs = {
        "attention_mask": mask,
        "position_ids": positions[0] if positions.shape[0] == 1 else positions,
    }
    return Trace(hidden[:requests, :length], kwargs, keep_mask, text_only)


def _grown_mask(
    kind: str, job: Job, read: Mapping[int, Prefill], keep_mask: Tensor, new: int
) -> Tensor:
    """bool [R, 1, S, S]: the prompts' own masks, continued causally over the completion."""
    length = keep_mask.shape[1]
    at = torch.arange(length, device=keep_mask.device)
    causal = at[None, :] <= at[:, None]
    window = next(iter(read.values())).windows.get(kind)
    if window is not None:
        causal &= at[None, :] > at[:, None] - window
    mask = causal & keep_mask[:, None, :]
    end = length - new
    for prompt, prefill in read.items():
        own = (prefill.masks or {}).get(kind)
        if own is not None:
            visible = own[0, 0] if own.dtype == torch.bool else own[0, 0] == 0
            begin = end - prefill.length
            rows = slice(prompt * job.num_generations, (prompt + 1) * job.num_generations)
            mask[rows, begin:end, begin:end] = visible[:, : prefill.length]
    # A padded query must see something: a softmax over nothing is NaN.
    mask |= torch.eye(length, dtype=torch.bool, device=mask.device) & ~keep_mask[:, :, None]
    return mask[:, None]
