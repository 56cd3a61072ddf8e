"""slot_attention on the Triton backend; run by test_triton_slot_attention.py in the interpreter."""

import pytest
import torch

from latent_rl import ops
from tests.ops.test_slot_attention import SIZES, by_hand, case_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Rounding of the weights to the values' dtype before the second product, and of the output.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-8}


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_RL_BACKEND", "slot_attention=triton")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_definition(size, dtype) -> None:
    query, keys, values, begins, ends = case_of(size, dtype)
    out = ops.slot_attention(query, keys, values, begins, ends, scale=0.3)
    expected = by_hand(query, keys, values, begins, ends, 0.3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_stretches_join() -> None:
    args = case_of((3, 700, 4, 2, 16, 16), torch.float32)
    begins, ends = torch.tensor([0, 250, 600]), torch.tensor([700, 263, 601])
    out = ops.slot_attention(*args[:3], begins, ends)
    expected = by_hand(*args[:3], begins, ends, 0.25)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6)


def test_a_row_depends_on_its_own_positions_alone_bit_for_bit() -> None:
    query, keys, values, _, _ = case_of((3, 600, 4, 2, 16, 16), torch.float32)
    begins, ends = torch.zeros(3).long(), torch.tensor([40, 600, 300])
    whole = ops.slot_attention(query, keys, values, begins, ends)
    # Alone, and with its slot cut off right behind it.
    alone = ops.slot_attention(query[2:], keys[2:, :300], values[2:, :300], begins[2:], ends[2:])
    assert torch.equal(whole[2:], alone)
    keys[0, 40:], values[0, 40:] = torch.nan, torch.nan
    assert torch.equal(ops.slot_attention(query, keys, values, begins, ends), whole)


def test_empty_and_clipped_ranges_and_strides() -> None:
    query, keys, values, _, _ = case_of(SIZES[1], torch.float32)
    begins, ends = torch.tensor([4, -7, 20]), torch.tensor([4, 99, 30])
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    out = ops.slot_attention(query, strided, values, begins, ends)
    assert (out[[0, 2]] == 0).all()
    whole = by_hand(query, keys, values, torch.zeros(3).long(), torch.full((3,), 9), 0.25)
    torch.testing.assert_close(out[1].double(), whole[1], rtol=0, atol=5e-6)


def test_no_rows() -> None:
    empty = torch.zeros(0, 4, 8), torch.zeros(0, 5, 2, 8), torch.zeros(0, 5, 2, 3)
    ids = torch.zeros(0, dtype=torch.int64)
    assert ops.slot_attention(*empty, ids, ids).shape == (0, 4, 3)
