"""The latent-action model over any Hugging Face image-text model."""

from latent_rl.models.checkpoint import load_into
from latent_rl.models.config import LatentConfig
from latent_rl.models.generation import LatentGeneration
from latent_rl.models.inspection import CodeTokens, code_top_tokens
from latent_rl.models.latent_action_model import InverseOutput, LatentActionModel
from latent_rl.models.modules import LatentModules
from latent_rl.models.trace import Trace

__all__ = [
    "CodeTokens",
    "InverseOutput",
    "LatentActionModel",
    "LatentConfig",
    "LatentGeneration",
    "LatentModules",
    "Trace",
    "code_top_tokens",
    "load_into",
]
