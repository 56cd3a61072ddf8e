"""Reward models: a sequence classifier with one output, given by name or as a model, as in TRL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from latent_rl.rewards.protocol import RewardFunction, RewardValue

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NamedRewardModel", "RewardModel", "resolve_rewards"]


class RewardModel:
    """The first logit of a classifier on prompt and completion, as in `trl.GRPOTrainer`.

    model             a sequence classifier with `num_labels=1` (any module whose output has
                      `logits` [B, 1]); put into evaluation mode, never trained
    processing_class  its tokenizer; or its processor, for a model that also reads images: the row's
                      `images` (or `image`) then come with the text
    batch_size        rows of one forward pass; None takes them all

    Conversations go through the chat template of the processing class, text prompts are joined with
    the completion as they are; no special tokens are added; padding is on the right. Runs without
    gradient on the device the model is on.

    Can be gamed as every learnt reward: the policy finds what the model overrates. Keep the KL
    term, and compare with a reward it has not been trained on.

    Raises:
        ValueError: a model with another number of labels.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        processing_class: Any,
        *,
        batch_size: int | None = None,
        name: str | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"RewardModel: batch_size must be >= 1 or None, got {batch_size}")
        config: Any = getattr(model, "config", None)
        labels = getattr(config, "num_labels", 1)
        if labels != 1:
            raise ValueError(f"RewardModel: the model must have num_labels=1, got {labels}")
        self.model = model.eval()
        self.processing_class, self.batch_size = processing_class, batch_size
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if config is not None:
            # The classifier scores the last token that is no padding, so it must know which is.
            config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.reads_images = hasattr(processing_class, "image_processor")
        self.__name__ = name or str(getattr(config, "_name_or_path", "")).rstrip("/").split("/")[-1]
        self.__name__ = self.__name__ or type(model).__name__

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        processing_class: Any | None = None,
        *,
        batch_size: int | None = None,
        dtype: str = "auto",
    ) -> RewardModel:
        """A model by name or directory, with its own tokenizer unless one is given. Code of the
        repository is never run."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype=dtype)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(name)
        return cls(model, processing_class, batch_size=batch_size)

    def to(self, device: torch.device | str) -> RewardModel:
        """Move the model."""
        self.model.to(device)
        return self

    @torch.inference_mode()
    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> list[RewardValue]:
        """See the class."""
        images = self._images(columns, len(prompts)) if self.reads_images else None
        texts = [self._text(p, c) for p, c in zip(prompts, completions, strict=True)]
        size = self.batch_size or max(1, len(texts))
        device = next(self.model.parameters()).device
        scores: list[RewardValue] = []
        for start in range(0, len(texts), size):
            rows = slice(start, start + size)
            given: dict[str, Any] = {"text": texts[rows]}
            if images is not None and any(images[rows]):
                given["images"] = images[rows]
            inputs = self.processing_class(
                **given,
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            )
            logits = self.model(**{k: v.to(device) for k, v in inputs.items()}).logits
            scores += logits[:, 0].float().tolist()
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return f"{prompt}{completion}"
        messages = [*prompt, *completion]
        if not self.reads_images:
            messages = [{**m, "content": _text_of(m["content"])} for m in messages]
        text: str = self.processing_class.apply_chat_template(messages, tokenize=False)
        return text

    def _images(self, columns: Mapping[str, Any], count: int) -> list[list[Any]]:
        if columns.get("images") is not None:
            return [list(images or []) for images in columns["images"]]
        if columns.get("image") is not None:
            return [[] if image is None else [image] for image in columns["image"]]
        return [[] for _ in range(count)]


class NamedRewardModel:
    """A reward model that is loaded when it first scores, as `RewardModel.from_pretrained` does.

    A name of the hub can be checked by loading alone; this lets a run check all the rest before.
    """

    def __init__(self, model: str, *, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"NamedRewardModel: batch_size must be >= 1 or None, got {batch_size}")
        self.model, self.batch_size = model, batch_size
        self.__name__ = model.rstrip("/").split("/")[-1]
        self._device: torch.device | str | None = None
        self._loaded: RewardModel | None = None

    def to(self, device: torch.device | str) -> NamedRewardModel:
        """Choose the device; without a choice it is the GPU, if there is one."""
        self._device = device
        return self

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> list[RewardValue]:
        """See `RewardModel`."""
        if self._loaded is None:
            self._loaded = RewardModel.from_pretrained(self.model, batch_size=self.batch_size)
            self._loaded.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return self._loaded(
            prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
        )


def resolve_rewards(
    reward_funcs: Any, processing_classes: Any = None, device: torch.device | str | None = None
) -> list[RewardFunction]:
    """The reward functions of a run, in TRL's forms.

    reward_funcs        a function, a model, a model's name, or a list of these
    processing_classes  one per reward (or a single one for a single reward): the tokenizer or
                        processor of a model, ignored for functions; None loads the model's own
    device              where models go; None leaves them

    Raises:
        TypeError: for what is no reward.
        ValueError: another number of processing classes than rewards, or no reward.
    """
    given = _as_list(reward_funcs)
    if not given:
        raise ValueError("reward_funcs: needs at least one reward function, got none")
    classes = [None] * len(given) if processing_classes is None else _as_list(processing_classes)
    if len(classes) != len(given):
        raise ValueError(
            f"reward_processing_classes must have one entry per reward function ({len(given)}), "
            f"got {len(classes)}"
        )
    functions: list[RewardFunction] = []
    for reward, processing_class in zip(given, classes, strict=True):
        function = reward
        if isinstance(reward, str):
            function = RewardModel.from_pretrained(reward, processing_class)
        elif isinstance(reward, nn.Module):
            function = RewardModel(reward, processing_class or _own_tokenizer(reward))
        if not callable(function):
            raise TypeError(
                "reward_funcs: expected functions, models or names of models, "
                f"got {type(reward).__name__}"
            )
        if isinstance(function, (RewardModel, NamedRewardModel)) and device is not None:
            function.to(device)
        functions.append(cast("RewardFunction", function))
    return functions


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def _own_tokenizer(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    config: Any = model.config
    return AutoTokenizer.from_pretrained(config._name_or_path)


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)
