"""How different the answers to one prompt are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

__all__ = ["distinct_n", "distinct_responses", "self_bleu"]


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


def self_bleu(group: Sequence[str], *, max_n: int = 4) -> float:
    """Mean BLEU of each sample of a prompt against the others, in (0, 1]; 1 for equal samples.

    Lower is more diverse. It counts shared words, so paraphrases look diverse and long answers to
    a narrow question look alike; it is no measure of meaning.

    BLEU is ``brevity * exp(mean_n log p_n)`` over n = 1..min(``max_n``, words of the sample) with
    clipped n-gram precisions p_n; a precision of 0 becomes 0.1 over the number of n-grams (Chen and
    Cherry 2014, method 1). An empty sample scores 1 when another is empty, else 0.

    Source: Zhu et al., "Texygen" (2018); Papineni et al., "BLEU" (2002).

    Raises:
        ValueError: for fewer than two samples, or ``max_n`` < 1.
    """
    if max_n < 1:
        raise ValueError(f"self_bleu: max_n must be at least 1, got {max_n}")
    if len(group) < 2:
        raise ValueError(f"self_bleu: needs at least 2 samples, got {len(group)}")
    words = [text.split() for text in group]
    scores = [_bleu(said, words[:i] + words[i + 1 :], max_n) for i, said in enumerate(words)]
    return math.fsum(scores) / len(scores)


def _bleu(said: list[str], references: list[list[str]], max_n: int) -> float:
    if not said:
        return float(any(not reference for reference in references))
    logs = []
    for n in range(1, min(max_n, len(said)) + 1):
        grams = _grams(said, n)
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= _grams(reference, n)
        total = len(said) - n + 1
        logs.append(math.log((sum((grams & most).values()) or 0.1) / total))
    nearest = min((len(r) for r in references), key=lambda size: (abs(size - len(said)), size))
    brevity = min(0.0, 1 - nearest / len(said))
    return math.exp(brevity + math.fsum(logs) / len(logs))


def _grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _require_groups(name: str, groups: Sequence[Sequence[str]]) -> None:
    if not groups or any(not group for group in groups):
        raise ValueError(f"{name}: groups must be non-empty lists of samples, got {groups!r:.80}")
