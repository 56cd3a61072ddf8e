"""sample_tokens: the codes of sample_codes, for a vocabulary of any size."""

import pytest
import torch

from latent_rl import ops
from latent_rl.reference.sample_tokens import sample_tokens as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def offsets(rows: int, step: int = 4) -> torch.Tensor:
    return torch.full((rows,), step, dtype=torch.int64)


# parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 130, 10_001])
def test_equals_the_reference_and_sample_codes(backend, size, dtype) -> None:
    logits = (2 * torch.randn(9, size)).to(dtype)
    tokens = ops.sample_tokens(logits, seed=3, offset=4)
    assert torch.equal(tokens, reference(logits, ops.row_seeds(3, 9), offsets(9)))
    assert torch.equal(tokens, ops.sample_codes(logits, seed=3, offset=4).codes)


def test_float32_copies_of_16_bit_logits_give_the_same_tokens(backend) -> None:
    logits = (3 * torch.randn(40, 500)).bfloat16()
    assert torch.equal(ops.sample_tokens(logits, seed=1), ops.sample_tokens(logits.float(), seed=1))


# the distribution


def test_frequencies_follow_the_softmax(backend) -> None:
    n, logits = 20_000, torch.randn(12)
    tokens = ops.sample_tokens(logits.expand(n, 12), seed=1)
    counts, probs = torch.bincount(tokens, minlength=12) / n, logits.softmax(-1)
    assert ((counts - probs).abs() < 4 * (probs * (1 - probs) / n).sqrt()).all()


# seeds


def test_a_row_depends_on_its_seed_and_offset_alone(backend) -> None:
    logits, seeds = torch.randn(16, 33), ops.row_seeds(4, 16)
    whole = ops.sample_tokens(logits, seed=seeds, offset=9)
    order = torch.randperm(16)
    assert torch.equal(ops.sample_tokens(logits[order], seed=seeds[order], offset=9), whole[order])
    assert not torch.equal(ops.sample_tokens(logits, seed=seeds, offset=torch.arange(16)), whole)


# torch registration


def test_opcheck() -> None:
    arguments = (torch.randn(3, 9), ops.row_seeds(0, 3), offsets(3))
    torch.library.opcheck(torch.ops.latent_rl.sample_tokens.default, arguments)


@pytest.mark.slow
def test_compiles_without_a_graph_break(backend) -> None:
    def step(logits, offset):
        return ops.sample_tokens(logits, seed=7, offset=offset)

    logits, offset = torch.randn(5, 30), torch.tensor(3)
    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(logits, offset), step(logits, offset))


# edges


def test_rows_without_a_distribution_and_masked_tokens(backend) -> None:
    logits = torch.randn(6, 40)
    logits[1, 3], logits[2, 0], logits[3], logits[4, 1:] = (
        torch.nan, torch.inf, -torch.inf, -torch.inf
    )  # fmt: skip
    tokens = ops.sample_tokens(logits, seed=0)
    assert (tokens == -1).tolist() == [False, True, True, True, False, False]
    assert tokens[4] == 0


def test_any_strides_and_no_rows(backend) -> None:
    logits = torch.randn(30, 2, 5).permute(1, 2, 0)[1]
    expected = ops.sample_tokens(logits.contiguous(), seed=2)
    assert torch.equal(ops.sample_tokens(logits, seed=2), expected)
    assert ops.sample_tokens(torch.empty(0, 9), seed=0).shape == (0,)


# errors


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"sample_tokens: logits must have shape \[B, V\], got \[3\]"),
        (torch.zeros(3, 0), ValueError, "at least one token, got V = 0"),
        (torch.zeros(3, 2, dtype=torch.int64), TypeError, "logits must be float32, bfloat16"),
    ],
)
def test_bad_logits_are_refused(logits, error, message) -> None:
    with pytest.raises(error, match=message):
        ops.sample_tokens(logits, seed=0)


def test_bad_offsets_are_refused() -> None:
    with pytest.raises(TypeError, match="sample_tokens: offset must be int64"):
        ops.sample_tokens(torch.zeros(3, 2), seed=0, offset=torch.zeros(3))
    with pytest.raises(ValueError, match=r"sample_tokens: offset must have shape \[3\]"):
        ops.sample_tokens(torch.zeros(3, 2), seed=0, offset=torch.zeros(2, dtype=torch.int64))
