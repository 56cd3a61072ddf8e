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
    "VectorQuantizer",
    "gaussian_nll",
    "perplexity",
]
