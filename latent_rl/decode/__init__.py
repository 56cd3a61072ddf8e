"""The batched latent decoding engine."""

from latent_rl.decode.engine import Decoder
from latent_rl.decode.memory import DecodePlan
from latent_rl.decode.output import FINISH_REASONS, DecodeError, DecodeOutput, Piece
from latent_rl.decode.run import DecodeRun

__all__ = [
    "FINISH_REASONS",
    "DecodeError",
    "DecodeOutput",
    "DecodePlan",
    "DecodeRun",
    "Decoder",
    "Piece",
]
