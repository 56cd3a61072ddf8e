"""Semantic diversity: how far apart in meaning the samples of a prompt are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latent_rl.eval.embedding import SentenceEncoder

__all__ = ["mean_pairwise_cosine", "pairwise_similarities", "semantic_diversity"]


def mean_pairwise_cosine(embeddings: Tensor) -> float:
    """Mean cosine similarity over the M (M - 1) / 2 pairs of M embeddings, in [-1, 1].

    With unit rows u_i the sum over ordered pairs is ``|sum_i u_i|^2 - M``, so no M x M matrix is
    made. Computed in float64.

    Args:
        embeddings: [M, D], M >= 2, any floating dtype; rows need not be normalised.

    Raises:
        ValueError: for another shape, M < 2, or a row that is zero or not finite.
    """
    if embeddings.ndim != 2 or embeddings.shape[0] < 2:
        raise ValueError(
            "mean_pairwise_cosine: embeddings must be [M >= 2, D] (one sample has no pair), "
            f"got {list(embeddings.shape)}"
        )
    rows = embeddings.detach().cpu().double()
    norms = rows.norm(dim=1, keepdim=True)
    if not (norms.isfinite().all() and (norms > 0).all()):
        raise ValueError("mean_pairwise_cosine: embeddings must be finite and non-zero rows")
    count = len(rows)
    squared = float((rows / norms).sum(0).square().sum())
    return min(1.0, max(-1.0, (squared - count) / (count * (count - 1))))


def semantic_diversity(similarity: float) -> float:
    """The papers' semantic diversity: the inverse of a mean pairwise cosine similarity.

    1 says that all samples mean the same; larger is more diverse. Similarities of 0 or less
    (orthogonal or opposed embeddings) give infinity: the measure has no finite value there.

    Hazards: it is unbounded and explodes as the similarity nears 0, so a mean of it over prompts is
    ruled by few of them; average similarities first and invert the average. It rewards noise (word
    salad is far from everything) and says nothing without the reward beside it. Numbers of two
    encoders, sampling temperatures or M are not comparable.

    Source: "semantic diversity" of arXiv 2503.21383 and arXiv 2601.07516 (the latter reports 1.079
    for token-level and 1.248 for latent GRPO).
    """
    return 1 / similarity if similarity > 0 else math.inf


def pairwise_similarities(groups: Sequence[Sequence[str]], encoder: SentenceEncoder) -> list[float]:
    """:func:`mean_pairwise_cosine` of each prompt's samples, in order.

    Every different text is encoded once. Empty texts are encoded as they are: two empty answers
    are equal.

    Raises:
        ValueError: when a group has fewer than two samples.
    """
    small = next((len(group) for group in groups if len(group) < 2), None)
    if small is not None:
        raise ValueError(
            f"pairwise_similarities: semantic diversity needs at least 2 samples a prompt, "
            f"got {small}"
        )
    texts = sorted({text for group in groups for text in group}, key=lambda t: (len(t), t))
    if not texts:
        return []
    place = {text: i for i, text in enumerate(texts)}
    embeddings = encoder.encode(texts)
    return [
        mean_pairwise_cosine(embeddings[torch.tensor([place[text] for text in group])])
        for group in groups
    ]
