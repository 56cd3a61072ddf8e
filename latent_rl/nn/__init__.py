"""Modules of the latent path: codebooks, quantizers, merge, projector, inverse model, policy."""

from latent_rl.nn.codebook import Codebook, EmaCodebook
from latent_rl.nn.inverse_dynamics import InverseDynamics
from latent_rl.nn.merge import BlockMerge, Merge, MergeBlock, NormDeltaMerge, ResidualMerge
from latent_rl.nn.policy import LatentPolicy
from latent_rl.nn.projector import CrossModalProjector, Gaussian, Projector, gaussian_nll
from latent_rl.nn.quantizers import (
    GumbelQuantizer,
    Quantized,
    Quantizer,
    VectorQuantizer,
    perplexity,
)
from latent_rl.nn.regularizers import orthogonality_loss, usage_loss
from latent_rl.nn.residual import ResidualQuantized, ResidualQuantizer

__all__ = [
    "BlockMerge",
    "Codebook",
    "CrossModalProjector",
    "EmaCodebook",
    "Gaussian",
    "GumbelQuantizer",
    "InverseDynamics",
    "LatentPolicy",
    "Merge",
    "MergeBlock",
    "NormDeltaMerge",
    "Projector",
    "Quantized",
    "Quantizer",
    "ResidualMerge",
    "ResidualQuantized",
    "ResidualQuantizer",
    "VectorQuantizer",
    "gaussian_nll",
    "orthogonality_loss",
    "perplexity",
    "usage_loss",
]
