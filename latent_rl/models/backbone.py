"""What the latent path needs to know about a Hugging Face image-text model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

# Config names of tokens that stand for image or video features.
_FEATURE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
_FRAME_TOKENS = ("vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id",
                 "boi_token_index", "eoi_token_index")  # fmt: skip
_FEATURE_INPUTS = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


def plain_model(backbone: nn.Module) -> Any:
    """The transformers model inside an optional PEFT wrapper."""
    unwrap = getattr(backbone, "get_base_model", None)
    return unwrap() if callable(unwrap) else backbone


def trunk(backbone: nn.Module) -> Any:
    """The model without its vocabulary head."""
    return plain_model(backbone).base_model


def check_backbone(backbone: nn.Module) -> None:
    """Refuse what is known not to work.

    Raises:
        TypeError: when it is no image-text model of transformers (no ``get_decoder``).
        ValueError: for PaliGemma.
    """
    model = plain_model(backbone)
    if not hasattr(model, "get_decoder") or not hasattr(model, "generate"):
        raise TypeError(
            "LatentActionModel: backbone must be a transformers image-text model (with "
            f"get_decoder() and generate()), got {type(model).__name__}"
        )
    model_type = str(getattr(model.config, "model_type", ""))
    if "paligemma" in model_type.lower():
        raise ValueError(
            "LatentActionModel: PaliGemma is not supported: its prefix mask differs between "
            "generation and an unlabelled full forward, so rollout and update would disagree"
        )


def feature_token_ids(config: Any) -> list[int]:
    """Ids of the tokens that image, video or audio features replace."""
    return _ids(config, _FEATURE_TOKENS)


def suppressed_token_ids(config: Any) -> list[int]:
    """Ids that a rollout must not emit: the next forward would look for features behind them."""
    return _ids(config, _FEATURE_TOKENS + _FRAME_TOKENS)


def _ids(config: Any, names: tuple[str, ...]) -> list[int]:
    values = (getattr(config, name, None) for name in names)
    return sorted({value for value in values if isinstance(value, int)})


def check_inputs(backbone: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs that would be misread silently.

    Raises:
        ValueError: without ``input_ids``, with ``labels``, or with image inputs that lack the
            token types the architecture needs. (Without them Qwen2.5-VL falls back to plain
            positions and Gemma3 to causal image attention, both silently.)
    """
    if "input_ids" not in inputs:
        raise ValueError("LatentActionModel: inputs must have input_ids")
    if "labels" in inputs:
        raise ValueError("LatentActionModel: inputs must not have labels; give them to the stage")
    if not any(name in inputs for name in _FEATURE_INPUTS):
        return
    accepted = inspect.signature(type(trunk(backbone)).forward).parameters
    for name in _TOKEN_TYPES:
        if name in accepted and inputs.get(name) is None:
            raise ValueError(
                f"LatentActionModel: image inputs of {type(plain_model(backbone)).__name__} need "
                f"{name}; take it from the processor (return_mm_token_type_ids=True)"
            )


def extend_inputs(
    inputs: Mapping[str, Tensor], tokens: Tensor, keep_mask: Tensor
) -> dict[str, Tensor]:
    """Prompt inputs followed by generated tokens.

    Args:
        inputs: prompt inputs; ``input_ids`` [B, P].
        tokens: int64 [B, T] to append.
        keep_mask: bool [B, T], False where a row has ended.

    Returns:
        Inputs of length P + T; token types of the new positions are 0 (text).
    """
    ids = inputs["input_ids"]
    attention = prompt_mask(inputs).to(torch.int64)
    out = dict(inputs)
    out["input_ids"] = torch.cat([ids, tokens], dim=1)
    out["attention_mask"] = torch.cat([attention, keep_mask.to(attention.dtype)], dim=1)
    for name in _TOKEN_TYPES:
        if name in out:
            zeros = out[name].new_zeros(tokens.shape)
            out[name] = torch.cat([out[name], zeros], dim=1)
    return out


def prompt_mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """bool [B, L], True at real positions: the attention mask, or all True without one."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    return mask.bool()


class _StubOutput(BaseModelOutputWithPast):
    """A trunk's output that has nothing but states; any other field reads as None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class VocabularyHead:
    """From states to the logits the backbone itself computes from them, in float32.

    Some architectures cap (Gemma) or scale (Cohere, Granite) their logits, some only in the
    text-only class of the same family. Which of them this backbone does is found out once, by
    running its own forward on two random states with the trunk stubbed out.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """Find out what the backbone does after its output embeddings.

        Raises:
            ValueError: when none of the known forms reproduces the backbone's logits.
        """
        model = plain_model(backbone)
        self._embeddings = model.get_output_embeddings
        if self._embeddings() is None:
            raise ValueError(f"LatentActionModel: {type(model).__name__} has no output embeddings")
        self._scale, self._cap = 1.0, None
        text = model.config.get_text_config()
        forms = [
            (float(scale), None if cap is None else float(cap))
            for cap in {None: 0, getattr(text, "final_logit_softcapping", None): 0}
            for scale in (1.0, getattr(text, "logit_scale", None), _inverse(text))
            if scale is not None
        ]
        weight = self._embeddings().weight
        if len(forms) == 1 or weight.is_meta:
            return
        self._scale, self._cap = self._measure(model, weight, forms)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., H] -> float32 [..., V]."""
        return self.scores(hidden).float()

    def scores(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], the same values; float32 only where a cap or a scale needs it."""
        embeddings = self._embeddings()
        logits: Tensor = embeddings(hidden.to(embeddings.weight.dtype))
        if self._scale == 1.0 and self._cap is None:
            return logits
        return _shape_logits(logits.float(), self._scale, self._cap)

    @torch.no_grad()
    def _measure(
        self, model: Any, weight: Tensor, forms: list[tuple[float, float | None]]
    ) -> tuple[float, float | None]:
        hidden = torch.randn(1, 2, weight.shape[1], generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(weight.device)
        # Logits of about 30: where a cap or a scale shows far above rounding.
        spread = torch.nn.functional.linear(hidden, weight.float()).std().clamp_min(1e-6)
        hidden = (hidden * (30.0 / spread)).to(weight.dtype)
        base = model.base_model
        base.forward = lambda *args, **kwargs: _StubOutput(last_hidden_state=hidden)
        try:
            ids = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
            expected = model(input_ids=ids).logits.float()
        finally:
            del base.forward
        plain = self._embeddings()(hidden).float()
        for scale, cap in forms:
            if torch.allclose(_shape_logits(plain, scale, cap), expected, rtol=0.02, atol=0.1):
                return scale, cap
        raise ValueError(
            f"LatentActionModel: {type(model).__name__} changes its logits after the output "
            "embeddings in a way that is not known here"
        )


def _inverse(text_config: Any) -> float | None:
    scaling = getattr(text_config, "logits_scaling", None)
    return None if scaling is None else 1.0 / cast(float, scaling)


def _shape_logits(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)
