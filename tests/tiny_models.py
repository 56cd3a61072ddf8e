"""Tiny random image-text models and their processors for tests: no hub, no torchvision.

``tiny_vlm("qwen2_5_vl")`` and its siblings in ``ARCHITECTURES`` return a model of about 0.2M
parameters and a processor whose tokenizer is trained on a few sentences here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

HIDDEN, HEADS, PIXELS = 64, 4, 32
SENTENCES = [
    "user assistant system You look at a picture and answer the question .",
    "What is in the picture ? A red house . A green tree . A blue boat on the water .",
    "How many birds are there ? one two three four five six seven eight nine ten",
]
CONTROL = ["<pad>", "<unk>", "<|turn|>", "<|end|>", "<|vision_start|>", "<|vision_end|>"]


class TinyVLM(NamedTuple):
    """A model in eval mode and its processor."""

    model: Any
    processor: Any


def _template(image: str) -> str:
    return (
        "{% for message in messages %}<|turn|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"<|vision_start|>{image}<|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )


@functools.cache
def _bpe(specials: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    return tokenizer


def _tokenizer(*image_tokens: str, **named: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe((*CONTROL, *image_tokens)).to_str()),
        eos_token="<|end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": image_tokens[0], **named},
    )


def _text(tokenizer: PreTrainedTokenizerFast, layers: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _vision(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": HEADS, "image_size": PIXELS, "patch_size": 8, **more}


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """Qwen's processor without its video part, which needs torchvision.

    transformers reads the parts of a processor off its ``__init__`` signature.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _qwen_parts() -> tuple[Any, dict[str, int]]:
    tokenizer = _tokenizer("<|image_pad|>", "<|video_pad|>")
    images = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": PIXELS * PIXELS},
    )
    processor = ImageOnlyQwenProcessor(images, tokenizer, _template("<|image_pad|>"))
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return processor, {k: tokenizer.convert_tokens_to_ids(v) for k, v in names.items()}


def _qwen2_5_vl() -> tuple[Any, Any]:
    processor, ids = _qwen_parts()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": HEADS}
    config = Qwen2_5_VLConfig(
        text_config=_text(processor.tokenizer, rope_parameters=rope, tie_word_embeddings=True),
        vision_config={
            **vision,
            "patch_size": 4,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [1],
            "window_size": 32,
        },
        tie_word_embeddings=True,
        **ids,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl() -> tuple[Any, Any]:
    processor, ids = _qwen_parts()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": HEADS}
    config = Qwen3VLConfig(
        text_config=_text(
            processor.tokenizer,
            layers=3,
            head_dim=16,
            rope_parameters={**rope, "mrope_section": [4, 2, 2]},
        ),
        vision_config={
            **vision,
            "patch_size": 4,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **ids,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": PIXELS, "width": PIXELS}, do_center_crop=False
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )
    config = LlavaConfig(
        vision_config=_vision(model_type="clip_vision_model", projection_dim=32),
        text_config=_text(tokenizer, model_type="llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    return LlavaForConditionalGeneration(config), processor


def _idefics_parts() -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": PIXELS},
            max_image_size={"longest_edge": PIXELS},
            do_image_splitting=False,
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=_template("<image>"),
    )
    return processor, {
        "text_config": _text(tokenizer, model_type="llama"),
        "vision_config": _vision(),
        "scale_factor": 2,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": tokenizer.pad_token_id,
    }


def _idefics3() -> tuple[Any, Any]:
    processor, sizes = _idefics_parts()
    return Idefics3ForConditionalGeneration(Idefics3Config(**sizes)), processor


def _smolvlm() -> tuple[Any, Any]:
    # SmolVLM's own processor has a video part; for images it lays out tokens as Idefics3 does.
    processor, sizes = _idefics_parts()
    return SmolVLMForConditionalGeneration(SmolVLMConfig(**sizes)), processor


def _gemma3() -> tuple[Any, Any]:
    soft, begin, end = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
    tokenizer = _tokenizer(soft, begin, end, boi_token=begin, eoi_token=end)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": PIXELS, "width": PIXELS}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=_template(begin),
    )
    config = Gemma3Config(
        text_config=_text(
            tokenizer,
            layers=3,
            head_dim=16,
            sliding_window=16,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config=_vision(vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_id=tokenizer.convert_tokens_to_ids(soft),
        boi_token_index=tokenizer.convert_tokens_to_ids(begin),
        eoi_token_index=tokenizer.convert_tokens_to_ids(end),
        pad_token_id=tokenizer.pad_token_id,
    )
    return Gemma3ForConditionalGeneration(config), processor


_BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
}
ARCHITECTURES = tuple(_BUILDERS)


def tiny_vlm(name: str = "qwen2_5_vl", *, seed: int = 0, spread: float = 3.0) -> TinyVLM:
    """A tiny random model and its processor, the same on every call.

    ``spread`` widens the weights: at the usual initial scale every position predicts nearly the
    same token, and a test of generation would be vacuous.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = _BUILDERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return TinyVLM(model.eval(), processor)


def tiny_image(seed: int = 0, pixels: int = PIXELS) -> Image.Image:
    """A random RGB image."""
    noise = np.random.default_rng(seed).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def render(
    processor: Any, texts: Sequence[str], images: Sequence[Image.Image | None]
) -> dict[str, torch.Tensor]:
    """A left-padded batch of one-turn prompts; a row whose image is None is text-only."""
    messages = [
        [
            {
                "role": "user",
                "content": ([{"type": "image", "image": image}] if image is not None else [])
                + [{"type": "text", "text": text}],
            }
        ]
        for text, image in zip(texts, images, strict=True)
    ]
    batch = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    return dict(batch)


def prompts(processor: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two prompts of different lengths, each with its own image."""
    texts = ["What is in the picture ?", "How many birds ? one"]
    return render(processor, texts, [tiny_image(seed), tiny_image(seed + 1)])
