"""Prompts one by one: a padded batch of the processor taken apart, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latent_rl.models import backbone as bb

__all__ = ["Inputs", "Prompt", "join_prompts", "split_prompts"]

# Inputs with one entry per image, and the grids that say how many patches an image has.
_PATCHES = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_PLACEHOLDERS = {
    "pixel_values": ("image_token_id", "image_token_index"),
    "pixel_values_videos": ("video_token_id",),
}
_PER_IMAGE = ("pixel_values", "pixel_attention_mask", "image_sizes")

Prompt = Mapping[str, Tensor]
"""The processor's tensors for one prompt, batch 1, without padding."""


Inputs = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
"""A batch of the processor, or a sequence of batches (of one prompt, usually)."""


def split_prompts(config: Any, inputs: Inputs) -> list[Prompt]:
    """Single prompts from a batch (padded on either side), or from prompts given one by one.

    Args:
        config: the backbone's configuration.
        inputs: what the processor made for B prompts, or a sequence of such dicts.

    Raises:
        ValueError: naming the input that cannot be attributed to its rows.
    """
    if not isinstance(inputs, Mapping):
        return [prompt for one in inputs for prompt in split_prompts(config, one)]
    if "input_ids" not in inputs or inputs["input_ids"].ndim != 2:
        raise ValueError("Decoder: inputs must have input_ids [B, P]")
    keep_mask = bb.prompt_mask(inputs)
    if not bool(keep_mask.any(1).all()):
        raise ValueError("Decoder: every prompt must have at least one token")
    _check_padding(keep_mask)
    rows = inputs["input_ids"].shape[0]
    prompts: list[dict[str, Tensor]] = [{} for _ in range(rows)]
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"Decoder: inputs must be tensors, {name} is {type(value).__name__}")
        for prompt, part in zip(prompts, _parts(config, inputs, name, keep_mask), strict=True):
            if part is not None:
                prompt[name] = part
    return list(prompts)


def join_prompts(prompts: Sequence[Prompt], pad_id: int) -> Prompt | None:
    """One left-padded batch of prompts; None when their images do not stack.

    Args:
        prompts: of :func:`split_prompts`.
        pad_id: of ``input_ids``; other token inputs are padded with 0.
    """
    if len(prompts) == 1:
        return prompts[0]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    whole = [
        {"attention_mask": torch.ones_like(prompt["input_ids"]), **prompt} for prompt in prompts
    ]
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for prompt in whole for name in prompt):
        parts = [prompt[name] for prompt in whole if name in prompt]
        missing = len(parts) < len(whole)
        if _is_per_token(name, whole):
            fill = pad_id if name == "input_ids" else 0
            parts = [
                torch.nn.functional.pad(part, (longest - part.shape[1], 0), value=fill)
                for part in parts
            ]
        elif name != "pixel_attention_mask" and parts[0].ndim < 5:
            # Entries per image, in the order of the rows: some rows may have none.
            missing = False
        if missing or len({part.shape[1:] for part in parts}) > 1:
            return None
        joined[name] = torch.cat(parts)
    return joined


def _is_per_token(name: str, prompts: Sequence[Prompt]) -> bool:
    """Whether an input has one number per token in every prompt that has it."""
    return all(p[name].shape == p["input_ids"].shape for p in prompts if name in p)


def _check_padding(keep_mask: Tensor) -> None:
    """Refuse holes: a prompt is one run of tokens."""
    starts = keep_mask[:, 1:] & ~keep_mask[:, :-1]
    if bool((starts.sum(1) + keep_mask[:, 0] > 1).any()):
        raise ValueError("Decoder: attention_mask must be one run of ones per row, got holes")


def _parts(
    config: Any, inputs: Mapping[str, Tensor], name: str, keep_mask: Tensor
) -> list[Tensor | None]:
    """One input, taken apart; None where a row has none of it."""
    value = inputs[name]
    rows, length = keep_mask.shape
    if value.ndim == 2 and value.shape == (rows, length):
        return [value[i, keep_mask[i]][None] for i in range(rows)]
    grids = {grid: pixels for pixels, grid in _PATCHES.items()}
    if name in _PATCHES and _PATCHES[name] in inputs:
        counts = _images_by_grid(config, inputs, name, keep_mask)
        patches = inputs[_PATCHES[name]].prod(-1).tolist()
        return _runs(value, _sums(patches, counts))
    if name in grids and grids[name] in inputs:
        return _runs(value, _images_by_grid(config, inputs, grids[name], keep_mask))
    if name in _PER_IMAGE:
        return _by_image(config, inputs, name, keep_mask)
    if rows == 1:
        return [value]
    raise ValueError(
        f"Decoder: cannot tell which rows of {name} {list(value.shape)} belong to which prompt; "
        "give the prompts one by one, as a list"
    )


def _placeholder_counts(config: Any, inputs: Mapping[str, Tensor], pixels: str) -> list[int]:
    ids = [getattr(config, n, None) for n in _PLACEHOLDERS[pixels]]
    known = torch.tensor([i for i in ids if i is not None], device=inputs["input_ids"].device)
    return [int(n) for n in torch.isin(inputs["input_ids"], known).sum(1)]


def _images_by_grid(
    config: Any, inputs: Mapping[str, Tensor], pixels: str, keep_mask: Tensor
) -> list[int]:
    """Images per row: they are in the order of the rows, and a grid says their tokens."""
    merge = int(config.vision_config.spatial_merge_size) ** 2
    tokens = [int(n) // merge for n in inputs[_PATCHES[pixels]].prod(-1)]
    counts, at = [], 0
    for wanted in _placeholder_counts(config, inputs, pixels):
        begin, have = at, 0
        while have < wanted and at < len(tokens):
            have += tokens[at]
            at += 1
        if have != wanted:
            raise ValueError(
                f"Decoder: {_PATCHES[pixels]} promises {have} image tokens where input_ids have "
                f"{wanted}"
            )
        counts.append(at - begin)
    if at != len(tokens):
        raise ValueError(f"Decoder: {_PATCHES[pixels]} has {len(tokens)} entries, {at} are used")
    return counts


def _by_image(
    config: Any, inputs: Mapping[str, Tensor], name: str, keep_mask: Tensor
) -> list[Tensor | None]:
    """Inputs with one entry per row, or one per image with as many tokens each."""
    value, rows = inputs[name], keep_mask.shape[0]
    wanted = _placeholder_counts(config, inputs, "pixel_values")
    padded = value.shape[0] == rows and inputs["pixel_values"].ndim == 5
    if padded or (value.shape[0] == rows and all(wanted)):
        return [value[i : i + 1] if wanted[i] else None for i in range(rows)]
    each, rest = divmod(sum(wanted), value.shape[0])
    if rest or any(n % each for n in wanted):
        raise ValueError(
            f"Decoder: cannot tell which of the {value.shape[0]} images of {name} belong to which "
            "prompt; give the prompts one by one, as a list"
        )
    return _runs(value, [n // each for n in wanted])


def _sums(values: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Sums of consecutive runs of the given lengths."""
    out, at = [], 0
    for count in counts:
        out.append(sum(values[at : at + count]))
        at += count
    return out


def _runs(value: Tensor, counts: Sequence[int]) -> list[Tensor | None]:
    """Consecutive runs of the given lengths along the first axis; None for length 0."""
    return [part if len(part) else None for part in torch.split(value, list(counts))]
