"""The trainable part of a latent-action model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from latent_rl.models.config import DTYPES, MERGES, QUANTIZERS, LatentConfig
from latent_rl.models.towers import final_norm, make_tower
from latent_rl.nn import (
    CrossModalProjector,
    GumbelQuantizer,
    InverseDynamics,
    LatentPolicy,
    VectorQuantizer,
)


class LatentModules(nn.Module):
    """Inverse model, quantizer (with the codebook), merge, projector and policy.

    Attributes:
        inverse: :class:`~latent_rl.nn.InverseDynamics`.
        quantizer: vector or Gumbel quantizer; owns ``.codebook``.
        merge: one of the forms of :mod:`latent_rl.nn.merge`.
        projector: :class:`~latent_rl.nn.CrossModalProjector` or None.
        policy: :class:`~latent_rl.nn.LatentPolicy`.
    """

    def __init__(self, decoder: Any, config: LatentConfig) -> None:
        """Build all of them for a decoder, on its device."""
        super().__init__()
        hidden = int(decoder.config.hidden_size)
        dim = config.code_dim or hidden
        intermediate = config.merge_intermediate or int(decoder.config.intermediate_size)
        dtype = decoder.dtype if config.dtype == "backbone" else DTYPES[config.dtype]

        def tower(layers: int) -> nn.Module:
            return make_tower(
                decoder, layers, dtype=dtype, init_from_backbone=config.init_from_backbone
            )

        self.quantizer: VectorQuantizer | GumbelQuantizer
        self.quantizer = QUANTIZERS[config.quantizer](config, dim)
        features = self.quantizer.feature_dim
        self.inverse = InverseDynamics(tower(config.inverse_layers), hidden, features)
        self.policy = LatentPolicy(tower(config.policy_layers), hidden, config.num_codes)
        self.merge = MERGES[config.merge_form](
            hidden, dim, intermediate, config.merge_blocks, final_norm(decoder)
        )
        self.projector = CrossModalProjector(hidden) if config.projector else None
        for module in (self.inverse.head, self.policy.head, self.merge, self.projector):
            if module is not None:
                module.to(device=decoder.device, dtype=dtype)
        # The codebook and its statistics stay in float32: moving averages need the precision.
        self.quantizer.to(device=decoder.device, dtype=torch.float32)
        self.requires_grad_(True)
