"""States of a group: a prompt once, and each of its completions, without any padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latent_rl.models import Trace

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["GroupStates", "group_states"]


@dataclass(frozen=True)
class GroupStates:
    """What the policy reads of one prompt and its completions, N = prompt + sum(lengths) positions.

    A completion of T tokens has T - 1 states: its first action is read off the prompt's last one,
    and its last token is never read.

    hidden     [N, H] the policy's input states, the prompt's first, then completion by completion
    positions  int64 [A, N] position ids, A rotary axes
    masks      by kind of layer, bool [prompt, prompt]: which keys a prompt position sees, where the
               decoder was given ready-made masks (Gemma3); empty means causal
    prompt     positions of the prompt
    lengths    states of each completion
    spilled    whether they are in host memory for want of room on the device
    """

    hidden: Tensor
    positions: Tensor
    masks: Mapping[str, Tensor]
    prompt: int
    lengths: tuple[int, ...]
    spilled: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.hidden, self.positions, *self.masks.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def offsets(self) -> list[int]:
        """Where each completion's states begin."""
        return list(accumulate(self.lengths, initial=self.prompt))[:-1]

    def take(
        self,
        members: Sequence[int],
        lengths: Sequence[int],
        device: torch.device | None = None,
    ) -> GroupStates:
        """Return the prompt and the first `lengths` states of the given completions, on a device;
        copies from pinned memory are asynchronous."""
        lengths, device = tuple(lengths), device or self.hidden.device
        whole = tuple(members) == tuple(range(len(self.lengths))) and lengths == self.lengths
        if whole and device == self.hidden.device:
            return self
        begins = self.offsets
        runs = [(0, self.prompt)]
        runs += [(begins[m], n) for m, n in zip(members, lengths, strict=True)]

        def cut(tensor: Tensor, axis: int) -> Tensor:
            parts = [tensor.narrow(axis, begin, n) for begin, n in runs]
            return torch.cat([part.to(device, non_blocking=True) for part in parts], axis)

        return replace(
            self,
            hidden=cut(self.hidden, 0),
            positions=cut(self.positions, 1),
            masks={kind: mask.to(device) for kind, mask in self.masks.items()},
            lengths=lengths,
        )

    def each(self, apply: Callable[[Tensor], Tensor]) -> GroupStates:
        """Return the same states with every tensor replaced by `apply` of it."""
        return replace(
            self,
            hidden=apply(self.hidden),
            positions=apply(self.positions),
            masks={kind: apply(mask) for kind, mask in self.masks.items()},
        )

    def to(self, device: torch.device) -> GroupStates:
        """Return the same states on a device."""
        return self.each(lambda tensor: tensor.to(device))

    def spill(self) -> GroupStates:
        """Return the same states in host memory, pinned where they come from a CUDA device."""
        pinned = self.hidden.is_cuda

        def move(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor)

        return replace(self.each(move), spilled=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by name and a dict for JSON."""
        tensors = {"hidden": self.hidden, "positions": self.positions}
        tensors |= {f"masks.{kind}": mask for kind, mask in self.masks.items()}
        meta = {"prompt": self.prompt, "lengths": list(self.lengths), "spilled": self.spilled}
        return tensors, meta

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> GroupStates:
        """The inverse of `state`."""
        masks = {n.removeprefix("masks."): t for n, t in tensors.items() if n.startswith("masks.")}
        return cls(
            tensors["hidden"],
            tensors["positions"],
            masks,
            int(meta["prompt"]),
            tuple(int(n) for n in meta["lengths"]),
            bool(meta["spilled"]),
        )


def group_states(
    model: LatentActionModel,
    trace: Trace,
    completions: Sequence[int],
    *,
    group_size: int,
    dtype: torch.dtype | None,
) -> list[GroupStates]:
    """Take the padded trace of a rollout apart into groups.

    Args:
        model: turns states into the policy's input (projected in rows without an image).
        trace: [B, P + T - 1] positions, prompts left-padded to P, completions behind them.
        completions: T_i, tokens of each completion, B of them; T is the longest.
        group_size: consecutive rows that share a prompt.
        dtype: to keep states in; None keeps the model's.

    Raises:
        ValueError: for decoders with attention masks of an unknown form.
    """
    prompt_width = trace.hidden.shape[1] - (max(completions) - 1)
    prompts = trace.keep_mask[::group_size, :prompt_width].sum(1).tolist()
    positions = _positions(trace)
    groups = []
    for number, prompt in enumerate(prompts):
        first = number * group_size
        rows = range(first, first + group_size)
        runs = [(first, prompt_width - prompt, prompt)]
        runs += [(row, prompt_width, max(completions[row] - 1, 0)) for row in rows]
        # Row by row, so that no second padded batch stands beside the first.
        states = [
            model.project(
                trace.hidden[row : row + 1, begin : begin + length], trace.text_only[row : row + 1]
            )[0]
            for row, begin, length in runs
        ]
        hidden = torch.cat(states)
        groups.append(
            GroupStates(
                hidden=hidden if dtype is None else hidden.to(dtype),
                positions=torch.cat([positions[:, r, b : b + n] for r, b, n in runs], 1),
                masks=_prompt_masks(trace, first, prompt_width - prompt, prompt),
                prompt=prompt,
                lengths=tuple(n for _, _, n in runs[1:]),
            )
        )
    return groups


def _positions(trace: Trace) -> Tensor:
    """Position ids [A, B, L]. A decoder that was given none counts from 0.

    Of four axes the first is a row's own count, which transformers uses for masks alone.
    """
    batch, length = trace.hidden.shape[:2]
    given = trace.tower_kwargs.get("position_ids")
    if given is None:
        given = torch.arange(length, device=trace.hidden.device)
    if given.ndim == 3 and given.shape[0] == 4:
        given = given[1:]
    axes = given.shape[0] if given.ndim == 3 else 1
    return given.expand(axes, batch, length)


def _prompt_masks(trace: Trace, row: int, begin: int, prompt: int) -> dict[str, Tensor]:
    given: Any = trace.tower_kwargs.get("attention_mask")
    if isinstance(given, Tensor) and given.ndim == 4:
        given = {"full_attention": given}
    if not isinstance(given, Mapping):
        return {}
    masks = {}
    own = slice(begin, begin + prompt)
    for kind, mask in given.items():
        if mask is None:
            continue
        if not (isinstance(mask, Tensor) and mask.ndim == 4):
            raise ValueError(f"replay: attention mask of {kind} must be [B, 1, L, L]")
        seen = mask[row if mask.shape[0] > 1 else 0, 0, own, own]
        masks[kind] = (seen if seen.dtype == torch.bool else seen == 0).clone()
    return masks
