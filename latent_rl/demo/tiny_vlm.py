"""A Qwen2.5-VL of about a million parameters, its tokenizer and its processor, from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from latent_rl.demo.scans import SCAN_PIXELS

__all__ = ["TinyVlmSizes", "build_model", "build_processor", "load_model", "load_processor"]

_IMAGE, _VIDEO = "<|image_pad|>", "<|video_pad|>"
_CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", _IMAGE,
    _VIDEO, "<unk>",
)  # fmt: skip
_PATCH, _MERGE = 4, 2
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"<|vision_start|>{_IMAGE}<|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyVlmSizes:
    """Sizes of the model; ``hidden`` must be a multiple of 32 (four heads of mrope sections)."""

    hidden: int = 96
    layers: int = 3
    vision_hidden: int = 96
    vision_layers: int = 2
    vocabulary: int = 1024


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video part, which needs torchvision.

    transformers reads the parts of a processor off its ``__init__`` signature.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        """As the parent's, for images and text alone."""
        self.image_token, self.video_token = _IMAGE, _VIDEO
        self.image_token_id = tokenizer.convert_tokens_to_ids(_IMAGE)
        self.video_token_id = tokenizer.convert_tokens_to_ids(_VIDEO)
        initialise: Any = ProcessorMixin.__init__
        initialise(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(texts: Iterable[str], sizes: TinyVlmSizes) -> ImageTextProcessor:
    """A processor whose byte-level BPE is trained on ``texts``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.vocabulary,
        special_tokens=list(_CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _processor(bpe)


def load_processor(directory: Path) -> ImageTextProcessor:
    """The processor of a model directory written by :func:`save_processor`."""
    return _processor(Tokenizer.from_file(str(directory / "tokenizer.json")))


def _processor(bpe: Tokenizer) -> ImageTextProcessor:
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer = tokenizer_class(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": _IMAGE},
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=_PATCH,
        merge_size=_MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": SCAN_PIXELS**2, "longest_edge": SCAN_PIXELS**2},
    )
    return ImageTextProcessor(images, tokenizer, _TEMPLATE)


def build_model(
    processor: ImageTextProcessor, sizes: TinyVlmSizes
) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights from torch's generator."""
    tokenizer: Any = processor.tokenizer
    head_dim = sizes.hidden // 4
    section = [head_dim // 8, 3 * head_dim // 16]
    text = {
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [*section, head_dim // 2 - sum(section)],
        },
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": 2 * sizes.vision_hidden,
        "num_heads": 4,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "out_hidden_size": sizes.hidden,
        "fullatt_block_indexes": [sizes.vision_layers - 1],
        "window_size": 8 * _PATCH,
    }
    ids = {
        "image_token_id": _IMAGE,
        "video_token_id": _VIDEO,
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    generation: Any = model.generation_config
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    return model


def load_model(directory: Path) -> Qwen2_5_VLForConditionalGeneration:
    """A model saved with ``save_pretrained``, in eval mode."""
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory)
    loaded: Qwen2_5_VLForConditionalGeneration = model.eval()
    return loaded
