"""A dataset of hidden states: the frozen trunk runs once per row, not once per stage and epoch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from latent_rl.models import Trace
from latent_rl.train.checkpoint_files import read_tensors, write_json, write_tensors
from latent_rl.train.features import view_states
from latent_rl.train.stages.base import Batch
from latent_rl.train.token_loss import IGNORE_INDEX

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["CachedRow", "FeatureCache", "build_feature_cache", "collate_features"]

TENSORS_FILE = "features.safetensors"
INDEX_FILE = "features.json"
FORMAT = 1


@dataclass(frozen=True)
class CachedRow:
    """What the stages need of one row of L real positions.

    hidden [L, H]; labels [L]; position_ids [L] or [A, L] (A axes of multimodal rotary positions) or
    None; text_only; for paired rows the M aligned tokens: text_hidden [M, H] (their states without
    the image), image_positions [M] (their places in this row), else None.
    """

    hidden: Tensor
    labels: Tensor
    position_ids: Tensor | None
    text_only: bool
    text_hidden: Tensor | None = None
    image_positions: Tensor | None = None


class FeatureCache(Dataset[CachedRow]):
    """Cached rows in memory; `save` and `load` keep them as one safetensors file.

    Give it to a StageTrainer as `train_dataset`: it brings its own collator, and the stages take
    its batches exactly as they take rendered ones.
    """

    def __init__(self, rows: Sequence[CachedRow]) -> None:
        self.rows = list(rows)
        self.lengths = [row.hidden.shape[0] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CachedRow:
        return self.rows[index]

    def __add__(self, other: Dataset[CachedRow]) -> FeatureCache:  # type: ignore[override]
        """Join two caches (say, of paired and of text-only rows) into one."""
        if not isinstance(other, FeatureCache):
            raise TypeError(
                f"FeatureCache: can only add a FeatureCache, got {type(other).__name__}"
            )
        return FeatureCache([*self.rows, *other.rows])

    def save(self, directory: Path) -> None:
        """Write the rows into `directory` (made if missing); the index is written last."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for index, row in enumerate(self.rows):
            for name in ("hidden", "labels", "position_ids", "text_hidden", "image_positions"):
                value = getattr(row, name)
                if value is not None:
                    tensors[f"{index}.{name}"] = value
        write_tensors(directory / TENSORS_FILE, tensors)
        text_only = [row.text_only for row in self.rows]
        write_json(directory / INDEX_FILE, {"format": FORMAT, "text_only": text_only})

    @classmethod
    def load(cls, directory: Path) -> FeatureCache:
        """Read what `save` wrote. Raises ValueError if it is missing, corrupt or of another
        format."""
        try:
            index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
            text_only = index["text_only"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"cannot read feature cache {directory}: {error!r}") from error
        if index.get("format") != FORMAT:
            raise ValueError(
                f"feature cache {directory} has format {index.get('format')}, expected {FORMAT}"
            )
        tensors = read_tensors(directory / TENSORS_FILE)
        try:
            rows = [_row_of(tensors, number, flag) for number, flag in enumerate(text_only)]
        except KeyError as error:
            raise ValueError(f"feature cache {directory} lacks tensor {error}") from error
        return cls(rows)


def _row_of(tensors: dict[str, Tensor], number: int, text_only: bool) -> CachedRow:
    return CachedRow(
        hidden=tensors[f"{number}.hidden"],
        labels=tensors[f"{number}.labels"],
        position_ids=tensors.get(f"{number}.position_ids"),
        text_only=bool(text_only),
        text_hidden=tensors.get(f"{number}.text_hidden"),
        image_positions=tensors.get(f"{number}.image_positions"),
    )


def build_feature_cache(
    model: LatentActionModel,
    dataset: Any,
    collator: Callable[[list[Any]], Batch],
    *,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureCache:
    """Encode every row of a dataset once.

    dataset    a sequence of rows that `collator` turns into batches (with `text_view` where the
               stages to come want paired views)
    dtype      of the stored states; None keeps the backbone's
    progress   called with (rows done, rows in all) after every batch

    Raises:
        ValueError: the decoder of this architecture prepares attention masks of its own (Gemma3),
            which a cache of single rows cannot rebuild.
    """
    total = len(dataset)
    rows: list[CachedRow] = []
    model.eval()
    for start in range(0, total, batch_size):
        examples = [dataset[index] for index in range(start, min(total, start + batch_size))]
        rows += _encode_rows(model, _to_device(collator(examples), model.device), dtype)
        if progress is not None:
            progress(len(rows), total)
    return FeatureCache(rows)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if hasattr(value, "items"):
        return {name: _to_device(inner, device) for name, inner in value.items()}
    return value


@torch.no_grad()
def _encode_rows(
    model: LatentActionModel, batch: Batch, dtype: torch.dtype | None
) -> Iterator[CachedRow]:
    trace = model.encode(batch["inputs"])
    dtype = dtype or trace.hidden.dtype
    mask = trace.tower_kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ValueError(
            f"build_feature_cache: the decoder of {type(model.backbone).__name__} prepares its own "
            "attention masks; train its stages without a cache"
        )
    view = batch.get("text_view")
    views = {} if view is None else _views_by_row(model, view, dtype)
    # True position -> index among the row's real tokens: pads are cut away below.
    places = trace.keep_mask.long().cumsum(1) - 1
    for index, keep in enumerate(trace.keep_mask):
        text_hidden, image_positions = views.get(index, (None, None))
        if image_positions is not None:
            image_positions = places[index, image_positions].cpu()
        yield CachedRow(
            hidden=trace.hidden[index, keep].to("cpu", dtype),
            labels=batch["labels"][index].to(keep.device)[keep].cpu(),
            position_ids=_positions(trace, index, keep),
            text_only=bool(trace.text_only[index]),
            text_hidden=text_hidden,
            image_positions=image_positions,
        )


def _views_by_row(
    model: LatentActionModel, view: dict[str, Any], dtype: torch.dtype
) -> dict[int, tuple[Tensor, Tensor]]:
    """Row index -> (text_hidden [M, H] on the CPU, image_positions [M]) of the batch's paired
    rows."""
    if view["rows"].numel() == 0:
        return {}
    states = view_states(model, view)
    views = {}
    for index, row in enumerate(view["rows"].tolist()):
        kept = view["keep_mask"][index]
        places = view["image_positions"][index][kept]
        views[row] = (states[index, kept.to(states.device)].to("cpu", dtype), places)
    return views


def _positions(trace: Trace, index: int, keep: Tensor) -> Tensor | None:
    positions = trace.tower_kwargs.get("position_ids")
    if positions is None:
        return None
    batch_axis = positions.ndim - 2
    row = 0 if positions.shape[batch_axis] == 1 else index
    kept: Tensor = positions.select(batch_axis, row)[..., keep].cpu()
    return kept


def collate_features(rows: list[CachedRow]) -> Batch:
    """Pad cached rows on the right into a batch: `trace`, `labels`, and `text_view` of paired
    rows."""
    labels = pad_sequence([row.labels for row in rows], True, IGNORE_INDEX)
    keep_mask = pad_sequence([torch.ones_like(row.labels, dtype=torch.bool) for row in rows], True)
    kwargs: dict[str, Any] = {"attention_mask": keep_mask.long()}
    positions = _padded_positions(rows)
    if positions is not None:
        kwargs["position_ids"] = positions
    trace = Trace(
        hidden=pad_sequence([row.hidden for row in rows], True),
        tower_kwargs=kwargs,
        keep_mask=keep_mask,
        text_only=torch.tensor([row.text_only for row in rows]),
    )
    batch: dict[str, Any] = {"trace": trace, "labels": labels}
    paired = [
        (index, row.text_hidden, row.image_positions)
        for index, row in enumerate(rows)
        if row.text_hidden is not None and row.image_positions is not None
    ]
    if paired:
        places = [image for _, _, image in paired]
        batch["text_view"] = {
            "rows": torch.tensor([index for index, _, _ in paired]),
            "hidden": pad_sequence([text for _, text, _ in paired], True),
            "image_positions": pad_sequence(places, True),
            "keep_mask": pad_sequence(
                [torch.ones_like(place, dtype=torch.bool) for place in places], True
            ),
        }
    return batch


def _padded_positions(rows: list[CachedRow]) -> Tensor | None:
    """[B, L] or [A, B, L]; None if no row has position ids.

    A decoder that was given none counts from 0 (Qwen2.5-VL does so for batches without images), so
    a row cached without them gets the count on every axis.
    """
    known = next((row.position_ids for row in rows if row.position_ids is not None), None)
    if known is None:
        return None
    positions = []
    for row in rows:
        count = torch.arange(row.hidden.shape[0]).expand(*known.shape[:-1], -1)
        own = count if row.position_ids is None else row.position_ids
        # pad_sequence pads the first axis: [A, L] -> [L, A].
        positions.append(own.movedim(-1, 0))
    padded = pad_sequence(positions, True)
    return padded if padded.ndim == 2 else padded.movedim(-1, 0).contiguous()
