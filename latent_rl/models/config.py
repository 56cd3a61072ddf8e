"""Settings of the latent path: one frozen dataclass, stored as JSON beside the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latent_rl.nn import (
    BlockMerge,
    Codebook,
    EmaCodebook,
    GumbelQuantizer,
    Merge,
    NormDeltaMerge,
    ResidualMerge,
    VectorQuantizer,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LatentConfig:
    """What the latent modules look like; everything else follows from the backbone.

    Attributes:
        num_codes: K (the paper: 128).
        code_dim: D, width of a code; None: the backbone's hidden size H.
        quantizer: "vq" (nearest code) or "gumbel" (the paper).
        metric: "l2" or "cosine", for the vector quantizer.
        gumbel_tau: temperature of the Gumbel straight-through gradient.
        gumbel_marginal_entropy: weight of the entropy of the batch's mean code distribution.
        vq_decay: moving-average decay of the codebook; None: learn it by gradient instead.
        vq_commitment: weight of the commitment loss.
        vq_dead_below: share of an even count below which a code is revived.
        inverse_layers: layers of the inverse model's tower.
        policy_layers: layers of the policy's tower.
        merge_blocks: merge blocks.
        merge_form: "residual" | "norm_delta" | "block", see :mod:`latent_rl.nn.merge`.
        merge_intermediate: I, width inside a merge block; None: the backbone's.
        projector: whether text-only rows pass the cross-modal projector.
        init_from_backbone: towers start as copies of the decoder's last layers.
        dtype: of the latent modules: "float32" (default: optimiser steps at 1e-6 vanish in
            bfloat16 weights; use autocast for speed), "bfloat16", "float16", or "backbone".
    """

    num_codes: int = 128
    code_dim: int | None = None
    quantizer: str = "vq"
    metric: str = "l2"
    gumbel_tau: float = 2.0
    gumbel_marginal_entropy: float = 0.02
    vq_decay: float | None = 0.99
    vq_commitment: float = 0.25
    vq_dead_below: float = 0.1
    inverse_layers: int = 4
    policy_layers: int = 8
    merge_blocks: int = 2
    merge_form: str = "residual"
    merge_intermediate: int | None = None
    projector: bool = True
    init_from_backbone: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Check every value once, here.

        Raises:
            ValueError: naming the field, what it may be and what it was.
        """
        for name in ("num_codes", "inverse_layers", "policy_layers", "merge_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"LatentConfig: {name} must be >= 1, got {getattr(self, name)}")
        for name in ("code_dim", "merge_intermediate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"LatentConfig: {name} must be >= 1 or None, got {value}")
        for name, table in (
            ("quantizer", QUANTIZERS),
            ("merge_form", MERGES),
            ("dtype", {**DTYPES, "backbone": None}),
            ("metric", {"l2": None, "cosine": None}),
        ):
            if getattr(self, name) not in table:
                allowed, got = ", ".join(table), getattr(self, name)
                raise ValueError(f"LatentConfig: {name} must be one of {allowed}, got {got!r}")
        if self.vq_decay is not None and not 0.0 <= self.vq_decay < 1.0:
            raise ValueError(f"LatentConfig: vq_decay must be in [0, 1), got {self.vq_decay}")
        if self.gumbel_tau <= 0:
            raise ValueError(f"LatentConfig: gumbel_tau must be > 0, got {self.gumbel_tau}")

    def to_json(self) -> str:
        """The settings as an indented JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> LatentConfig:
        """Settings from a mapping (parsed JSON or YAML).

        Raises:
            ValueError: for an unknown field (with the known ones) or a bad value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"LatentConfig: unknown field(s) {', '.join(unknown)}; known: "
                + ", ".join(sorted(known))
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"LatentConfig: a field has the wrong type ({error})") from error


def _vector_quantizer(config: LatentConfig, dim: int) -> VectorQuantizer:
    # Features start at the scale of a normed state through a 1/sqrt(H) head: about 1 per entry.
    if config.vq_decay is None:
        book = Codebook(config.num_codes, dim, metric=config.metric)
    else:
        book = EmaCodebook(
            config.num_codes,
            dim,
            metric=config.metric,
            decay=config.vq_decay,
            dead_below=config.vq_dead_below,
        )
    return VectorQuantizer(book, commitment=config.vq_commitment)


def _gumbel_quantizer(config: LatentConfig, dim: int) -> GumbelQuantizer:
    return GumbelQuantizer(
        Codebook(config.num_codes, dim),
        tau=config.gumbel_tau,
        marginal_entropy=config.gumbel_marginal_entropy,
    )


def _residual(h: int, d: int, i: int, blocks: int, norm: nn.Module) -> Merge:
    return ResidualMerge(h, d, i, blocks)


# The strings of the configuration become objects here and nowhere else.
QUANTIZERS: Mapping[str, Callable[[LatentConfig, int], VectorQuantizer | GumbelQuantizer]] = {
    "vq": _vector_quantizer,
    "gumbel": _gumbel_quantizer,
}
MERGES: Mapping[str, Callable[[int, int, int, int, nn.Module], Merge]] = {
    "residual": _residual,
    "norm_delta": NormDeltaMerge,
    "block": BlockMerge,
}
