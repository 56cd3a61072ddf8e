"""Models of given shapes with random weights, made where they are used: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latent_rl.models import LatentActionModel, LatentConfig

# The last words of a vocabulary stand for images, as in Qwen2.5-VL; random prompts avoid them.
_CONTROL_WORDS = 8


@dataclass(frozen=True)
class ScaleSizes:
    """Shapes of a Qwen2.5-VL and of its latent modules.

    Attributes:
        name: of the sizes, and of the command line.
        hidden, intermediate, layers, heads, kv_heads, vocabulary: of the text stack.
        vision_hidden, vision_intermediate, vision_layers, vision_heads: of the vision tower.
        patch: side of a patch in pixels.
        image_side: patches along each side of an image; a quarter of them become tokens.
        num_codes, policy_layers, inverse_layers, merge_blocks: of the latent modules.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    patch: int
    image_side: int
    num_codes: int = 128
    policy_layers: int = 8
    inverse_layers: int = 4
    merge_blocks: int = 2

    @property
    def head_dim(self) -> int:
        """Width of an attention head of the text stack."""
        return self.hidden // self.heads

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return self.image_side**2 // 4

    @property
    def image_token(self) -> int:
        """Id that stands for image features."""
        return self.vocabulary - _CONTROL_WORDS

    @property
    def words(self) -> int:
        """Ids below this are plain words."""
        return self.vocabulary - _CONTROL_WORDS


QWEN_3B = ScaleSizes(
    name="qwen2.5-vl-3b", hidden=2048, intermediate=11008, layers=36, heads=16, kv_heads=2,
    vocabulary=151936, vision_hidden=1280, vision_intermediate=3420, vision_layers=32,
    vision_heads=16, patch=14, image_side=32,
)  # fmt: skip
"""Qwen2.5-VL-3B-Instruct as published (3 754 622 976 parameters), with the paper's modules."""

FEW_LAYERS = ScaleSizes(
    name="few-layers", hidden=2048, intermediate=11008, layers=2, heads=16, kv_heads=2,
    vocabulary=151936, vision_hidden=1280, vision_intermediate=3420, vision_layers=1,
    vision_heads=16, patch=14, image_side=8, policy_layers=1, inverse_layers=1, merge_blocks=2,
)  # fmt: skip
"""The true widths with few layers: what depends on a width shows on any machine."""

TINY = ScaleSizes(
    name="tiny", hidden=64, intermediate=128, layers=3, heads=4, kv_heads=2, vocabulary=512,
    vision_hidden=32, vision_intermediate=64, vision_layers=1, vision_heads=2, patch=4,
    image_side=4, num_codes=16, policy_layers=2, inverse_layers=1, merge_blocks=2,
)  # fmt: skip
"""Seconds on a CPU."""

SIZES = {sizes.name: sizes for sizes in (QWEN_3B, FEW_LAYERS, TINY)}


def build_backbone(sizes: ScaleSizes, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen2.5-VL with random weights, frozen, in eval mode, that never ends a completion."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = sizes.head_dim // 2
    # 16, 24, 24 of 64 in the published model.
    section = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    text = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": section,
        },
        "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "num_heads": sizes.vision_heads,
        "patch_size": sizes.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": sizes.hidden,
        # Every eighth layer sees the whole image: 7, 15, 23, 31 of 32.
        "fullatt_block_indexes": [*range(7, sizes.vision_layers, 8)] or [sizes.vision_layers - 1],
        "window_size": 8 * sizes.patch,
    }
    first = sizes.image_token
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=first,
        video_token_id=first + 1, vision_start_token_id=first + 2, vision_end_token_id=first + 3,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def build_model(
    sizes: ScaleSizes, device: torch.device, dtype: torch.dtype, *, latent_dtype: str = "backbone"
) -> LatentActionModel:
    """The latent-action model of these shapes; ``latent_dtype`` as in ``LatentConfig.dtype``."""
    config = LatentConfig(
        num_codes=sizes.num_codes,
        inverse_layers=sizes.inverse_layers,
        policy_layers=sizes.policy_layers,
        merge_blocks=sizes.merge_blocks,
        dtype=latent_dtype,
    )
    backbone = build_backbone(sizes, device, dtype)
    # There too: a billion random numbers are slow on a CPU.
    with torch.device(device):
        model = LatentActionModel(backbone, config)
    # What starts at zero, so that no product is one with zeros, and codes change what is said.
    for block in model.latent.merge.blocks:
        nn.init.normal_(block.w_down, std=2 * sizes.intermediate**-0.5)
    projector = model.latent.projector
    if projector is not None:
        for net in (projector.to_image_text, projector.to_text):
            nn.init.normal_(net.mean_net[-1].weight, std=0.1 * sizes.hidden**-0.5)
    return model


def random_text(
    sizes: ScaleSizes, rows: int, length: int, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """Prompts of text alone, [rows, length], each another."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(sizes.words, (rows, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def random_pictures(
    sizes: ScaleSizes, rows: int, length: int, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """Sequences [rows, length] of an image and text, as the processor would make them.

    Raises:
        ValueError: when an image does not fit the length.
    """
    tokens = sizes.image_tokens
    if length < tokens + 3:
        raise ValueError(
            f"random_pictures: length must be >= {tokens + 3} for an image of {tokens} tokens, "
            f"got {length}"
        )
    inputs = random_text(sizes, rows, length, device, seed)
    first = sizes.image_token
    inputs["input_ids"][:, 0] = first + 2
    inputs["input_ids"][:, 1 : tokens + 1] = first
    inputs["input_ids"][:, tokens + 1] = first + 3
    side, width = sizes.image_side, 3 * 2 * sizes.patch**2
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows * side**2, width, generator=generator)
    grid = torch.tensor([[1, side, side]] * rows)
    types = (inputs["input_ids"] == first).to(torch.int64)
    return {
        **inputs,
        "mm_token_type_ids": types,
        "pixel_values": pixels.to(device),
        "image_grid_thw": grid.to(device),
    }
