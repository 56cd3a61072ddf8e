"""Data: the formats of the benchmarks, and collators that label responses alone."""

from latent_rl.data.chat import load_chat
from latent_rl.data.collators import (
    ConversationCollator,
    PairedViewCollator,
    check_processor,
    render_prompts,
)
from latent_rl.data.formats import (
    load_mmrole,
    load_paper_json,
    load_pcogalign,
    role_play_instructions,
)
from latent_rl.data.images import load_image
from latent_rl.data.render import IGNORE_INDEX, encode_conversation, encode_prompt
from latent_rl.data.rows import conversation_of, prompt_of

__all__ = [
    "IGNORE_INDEX",
    "ConversationCollator",
    "PairedViewCollator",
    "check_processor",
    "conversation_of",
    "encode_conversation",
    "encode_prompt",
    "load_chat",
    "load_image",
    "load_mmrole",
    "load_paper_json",
    "load_pcogalign",
    "prompt_of",
    "render_prompts",
    "role_play_instructions",
]
