"""The fewest bytes and operations a decoding step needs, counted from weights and lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latent_rl.decode.slot_cache import layer_shapes
from latent_rl.models import LatentActionModel


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one step of B rows reads (and, of keys and values, writes) at least.

    Attributes:
        trunk: weights of the decoder's layers and norm, and the embeddings of B tokens.
        policy: weights of projector, policy tower and its head.
        merge: weights behind the states' half of the wide products, and B rows of the tables.
        head: the vocabulary head's weights.
        kv: keys and values visible to the rows, a prompt once for all rows that share it, and the
            new position of every row.
        kv_by_rows: the same with a prompt once for every row.
    """

    trunk: int
    policy: int
    merge: int
    head: int
    kv: int
    kv_by_rows: int

    @property
    def weights(self) -> int:
        """All weights."""
        return self.trunk + self.policy + self.merge + self.head

    @property
    def total(self) -> int:
        """Weights, keys and values."""
        return self.weights + self.kv

    @property
    def total_by_rows(self) -> int:
        """The same when every row reads its prompt for itself."""
        return self.weights + self.kv_by_rows

    def floor_ms(self, copy_gb_per_s: float) -> float:
        """Milliseconds to stream :attr:`total` at the bandwidth of a copy."""
        return self.total / copy_gb_per_s / 1e6


def trunk_weights(model: LatentActionModel) -> list[Tensor]:
    """What a step reads of the decoder besides embeddings."""
    embeddings = model.decoder.get_input_embeddings()
    skip = {id(parameter) for parameter in embeddings.parameters()}
    return [p for p in model.decoder.parameters() if id(p) not in skip]


def head_weights(model: LatentActionModel) -> list[Tensor]:
    """Of the vocabulary head; tied to the embeddings or not."""
    backbone: Any = model.backbone
    return list(backbone.get_output_embeddings().parameters())


def policy_weights(model: LatentActionModel) -> list[Tensor]:
    """Of projector (the mean of text's way to image-text) and policy."""
    latent = model.latent
    projector = latent.projector
    mean = [] if projector is None else list(projector.to_image_text.mean_net.parameters())
    return [*mean, *latent.policy.parameters()]


def merge_weights(model: LatentActionModel) -> list[Tensor]:
    """Of the merge blocks, without the codes' half, which is in the tables."""
    found: list[Tensor] = []
    blocks: list[Any] = list(model.latent.merge.blocks)
    for block in blocks:
        hidden = block.w_down.shape[0]
        found += [block.w_gate[:, :hidden], block.w_up[:, :hidden], block.w_down]
    return found


def position_bytes(model: LatentActionModel) -> int:
    """Keys and values of one position, trunk and policy."""
    policy = model.latent.policy
    trunk = sum(shape.width for shape in layer_shapes(model.decoder)) * model.dtype.itemsize
    own = sum(shape.width for shape in layer_shapes(policy.tower))
    return trunk + own * policy.head.weight.dtype.itemsize


def step_bytes(
    model: LatentActionModel,
    prompts: Sequence[int],
    own: Sequence[int],
    *,
    group: int,
    tables_itemsize: int = 4,
) -> StepBytes:
    """Count one step.

    Args:
        model: the model, its weights on any device.
        prompts: length of each prompt.
        own: per row, positions cached besides its prompt's; ``group`` rows in a row share a prompt.
        group: rows per prompt.
        tables_itemsize: bytes of a number in the merge's tables.

    Raises:
        ValueError: when rows and prompts do not fit together.
    """
    rows = len(own)
    if rows != len(prompts) * group:
        raise ValueError(f"step_bytes: own must be of {len(prompts)} x {group} rows, got {rows}")
    width = position_bytes(model)
    blocks: list[Any] = list(model.latent.merge.blocks)
    table_row = sum(2 * block.w_gate.shape[0] * tables_itemsize for block in blocks)
    embedding = int(model.decoder.config.hidden_size) * model.dtype.itemsize
    said = sum(own) + rows
    return StepBytes(
        trunk=nbytes(trunk_weights(model)) + rows * embedding,
        policy=nbytes(policy_weights(model)),
        merge=nbytes(merge_weights(model)) + rows * table_row,
        head=nbytes(head_weights(model)),
        kv=width * (sum(prompts) + said),
        kv_by_rows=width * (group * sum(prompts) + said),
    )


def step_flops(model: LatentActionModel, rows: int) -> int:
    """Operations of the matrix products with weights in one step; attention's are left out."""
    weights = [
        *trunk_weights(model), *policy_weights(model), *merge_weights(model), *head_weights(model),
    ]  # fmt: skip
    return 2 * rows * sum(w.numel() for w in weights if w.ndim == 2)


def parameters(model: torch.nn.Module) -> int:
    """Numbers in a module."""
    return sum(p.numel() for p in model.parameters())
