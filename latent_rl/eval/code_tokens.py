"""What each code was used for: the tokens it said more often than chance, and where."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latent_rl.eval.answering import Answer

__all__ = ["CodeExample", "CodeUse", "TokenLift", "code_uses"]


@dataclass(frozen=True)
class TokenLift:
    """A token under a code: how often, and P(token | code) / P(token)."""

    token: str
    count: int
    lift: float


@dataclass(frozen=True)
class CodeExample:
    """One place where the code acted: the text before, the token it said, the text after."""

    before: str
    token: str
    after: str


@dataclass(frozen=True)
class CodeUse:
    """A code over a set of answers.

    Attributes:
        code: its id. count: tokens said under it.
        tokens: those that set it apart, strongest first.
        examples: from different answers where possible.
    """

    code: int
    count: int
    tokens: tuple[TokenLift, ...]
    examples: tuple[CodeExample, ...]


def code_uses(
    answers: Sequence[Answer],
    decode: Callable[[Sequence[int]], str],
    *,
    top: int = 8,
    examples: int = 3,
    context: int = 8,
) -> list[CodeUse]:
    """Uses of every code that occurs, most used first.

    Tokens are ranked by ``P(t|c) log(P(t|c) / P(t))``, their share of the divergence between what
    is said under the code and what is said at all: a high lift alone would put tokens first that
    occurred once. Only lifts above 1 are listed. This is what happened in sampled answers: the
    policy picks a code where its token fits, so a code's tokens are not all the code's doing;
    ``latent_rl.models.code_top_tokens`` tries every code on the same states.

    Args:
        answers: with codes; others are passed over.
        decode: token ids to text.
        top: tokens per code.
        examples: places per code.
        context: tokens shown before and after.

    Raises:
        ValueError: when an answer has codes but not one per token.
    """
    pairs: Counter[tuple[int, int]] = Counter()
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, answer in enumerate(answers):
        if not answer.codes:
            continue
        if len(answer.codes) != len(answer.tokens):
            raise ValueError(
                f"code_uses: an answer must have one code per token ({len(answer.tokens)}), "
                f"got {len(answer.codes)}"
            )
        seen: set[int] = set()
        for at, (code, token) in enumerate(zip(answer.codes, answer.tokens, strict=True)):
            pairs[code, token] += 1
            if code not in seen and len(places[code]) < examples:
                seen.add(code)
                places[code].append((number, at))
    by_code: dict[int, Counter[int]] = defaultdict(Counter)
    by_token: Counter[int] = Counter()
    for (code, token), count in pairs.items():
        by_code[code][token] += count
        by_token[token] += count
    everything = by_token.total()
    uses = []
    for code, counts in sorted(by_code.items(), key=lambda item: (-item[1].total(), item[0])):
        lifts = _lifts(counts, by_token, everything)[:top]
        uses.append(
            CodeUse(
                code,
                counts.total(),
                tuple(TokenLift(decode([t]), counts[t], lift) for t, lift in lifts),
                tuple(_example(answers[n], at, decode, context) for n, at in places[code]),
            )
        )
    return uses


def _lifts(
    counts: Counter[int], by_token: Counter[int], everything: int
) -> list[tuple[int, float]]:
    total = counts.total()
    lifts = {t: (n / total) / (by_token[t] / everything) for t, n in counts.items()}
    ranked = sorted(lifts, key=lambda t: (-counts[t] / total * math.log(lifts[t]), t))
    return [(t, lifts[t]) for t in ranked if lifts[t] > 1]


def _example(
    answer: Answer, at: int, decode: Callable[[Sequence[int]], str], context: int
) -> CodeExample:
    ids = answer.tokens
    return CodeExample(
        decode(ids[max(0, at - context) : at]),
        decode(ids[at : at + 1]),
        decode(ids[at + 1 : at + 1 + context]),
    )
