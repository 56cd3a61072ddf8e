"""How different the answers to one prompt are."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_responses(groups: Sequence[Sequence[str]]) -> float:
    """Mean share of different answers among the samples of a prompt, in (0, 1].

    ``groups[i]`` holds the M samples of prompt i; with M = 8 this is the share form of
    "distinct@8". 1/M says that every sample was the same, 1 that none repeated.

    Raises:
        ValueError: without groups, or when one is empty.
    """
    _require_groups("distinct_responses", groups)
    return sum(len(set(group)) / len(group) for group in groups) / len(groups)


def distinct_n(groups: Sequence[Sequence[str]], n: int) -> float:
    """Share of different word n-grams among all n-grams of a prompt's samples, averaged.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models"
    (2016), distinct-n. A prompt whose samples are all shorter than n words counts as 0.

    Raises:
        ValueError: for n < 1, without groups, or when one is empty.
    """
    if n < 1:
        raise ValueError(f"distinct_n: n must be at least 1, got {n}")
    _require_groups("distinct_n", groups)
    shares = []
    for group in groups:
        grams = [
            tuple(words[i : i + n])
            for words in (text.split() for text in group)
            for i in range(len(words) - n + 1)
        ]
        shares.append(len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def _require_groups(name: str, groups: Sequence[Sequence[str]]) -> None:
    if not groups or any(not group for group in groups):
        raise ValueError(f"{name}: groups must be non-empty lists of samples, got {groups!r:.80}")
