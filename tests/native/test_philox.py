"""The random stream: Philox4x32-10 against its published vectors and a scalar oracle."""

from __future__ import annotations

import numpy as np
import pytest

from latent_rl import _C

MASK = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as published, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


# Random123's kat_vectors for philox4x32-10.
PUBLISHED = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_the_oracle_reproduces_the_published_vectors(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    assert philox(counter, key) == words


def test_the_first_published_vector_is_the_stream_of_seed_zero(isa: str) -> None:
    assert _C.philox_words(0, 0, 4) == PUBLISHED[0][2]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 7, 2**32, 2**40 + 3, -1])
def test_every_word_follows_the_contract(isa: str, seed: int, offset: int) -> None:
    count = 131  # not a multiple of a vector, nor of four
    key = [seed & MASK, (seed >> 32) & MASK]
    high, low = (offset >> 32) & MASK, offset & MASK
    expected = [philox([k // 4, low, high, 0], key)[k % 4] for k in range(count)]
    assert _C.philox_words(seed, offset, count) == expected


def test_words_look_uniform() -> None:
    words = np.array(_C.philox_words(5, 0, 20000), dtype=np.float64) / 2**32
    # Standard error of the mean is 0.002; of the variance 0.0005.
    assert abs(words.mean() - 0.5) < 0.01
    assert abs(words.var() - 1 / 12) < 0.003
