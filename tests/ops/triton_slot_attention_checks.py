"""slot_attention on the Triton backend; run by test_triton_slot_attention.py in the interpreter."""

import pytest
import torch

from tests.ops.test_slot_attention import SIZES, attend, by_hand, case_of, places, runs_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Rounding of the weights to the values' dtype before the second product, and of the output.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-8}


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_RL_BACKEND", "slot_attention=triton")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_definition(size, dtype) -> None:
    query, keys, values, runs, longest = case_of(size, dtype)
    out = attend(query, keys, values, runs, longest, 0.3)
    expected = by_hand(query, keys, values, runs, 0.3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_stretches_join() -> None:
    query, keys, values, _, longest = case_of((3, 700, 4, 2, 16, 16), torch.float32)
    begins, ends = torch.tensor([0, 250, 600]), torch.tensor([700, 263, 601])
    runs = runs_of(begins, ends, longest, torch.tensor([300, 255, 0]))
    out = attend(query, keys, values, runs, longest)
    expected = by_hand(query, keys, values, runs, 0.25)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6)


def test_a_row_depends_on_its_own_positions_alone_bit_for_bit() -> None:
    query, keys, values, _, longest = case_of((3, 600, 4, 2, 16, 16), torch.float32)
    begins, ends = torch.zeros(3).long(), torch.tensor([40, 600, 300])
    runs = runs_of(begins, ends, longest, torch.tensor([7, 7, 90]))
    whole = attend(query, keys, values, runs, longest)
    # Alone, and with no row longer.
    assert torch.equal(whole[2:], attend(query[2:], keys, values, runs[2:], 300))
    # All of it in a run of its own.
    at = places(runs[2])
    own = torch.tensor([[0, 300, 0, 0, 0]])
    assert torch.equal(whole[2:], attend(query[2:], keys[at], values[at], own, 300))
    hidden = torch.ones(len(keys), dtype=torch.bool)
    for run in runs:
        hidden[places(run)] = False
    keys[hidden], values[hidden] = torch.nan, torch.nan
    assert torch.equal(attend(query, keys, values, runs, longest), whole)


def test_empty_and_clipped_ranges_and_strides() -> None:
    query, keys, values, _, longest = case_of(SIZES[1], torch.float32)
    shared = torch.tensor([3, 4, 5])
    runs = runs_of(torch.tensor([4, -7, 20]), torch.tensor([4, 99, 30]), longest, shared)
    strided = keys.transpose(0, 1).contiguous().transpose(0, 1)
    out = attend(query, strided, values, runs, longest)
    assert (out[[0, 2]] == 0).all()
    runs[1, :2] = torch.tensor([0, longest])
    whole = by_hand(query[1:2], keys, values, runs[1:2], 0.25)
    torch.testing.assert_close(out[1:2].double(), whole, rtol=0, atol=5e-6)


def test_runs_outside_the_storage_are_clamped_into_it() -> None:
    query, keys, values, _, longest = case_of(SIZES[1], torch.float32)
    runs = torch.tensor([[0, 4, -(1 << 40), 2, 5], [0, 4, 0, 0, 1 << 40], [0, 4, 0, 4, 0]])
    out = attend(query, keys, values, runs, longest)
    assert out.isfinite().all()
    expected = by_hand(query[2:], keys, values, runs[2:], 0.25)
    torch.testing.assert_close(out[2:].double(), expected, rtol=0, atol=5e-6)


def test_no_rows() -> None:
    empty = torch.zeros(0, 4, 8), torch.zeros(5, 2, 8), torch.zeros(5, 2, 3)
    assert attend(*empty, torch.zeros(0, 5, dtype=torch.int64), 7).shape == (0, 4, 3)


def test_launches_on_the_device_of_its_tensors(monkeypatch) -> None:
    query, keys, values, runs, longest = case_of(SIZES[1], torch.float32)
    entered = []
    real = torch.cuda.device_of

    def device_of(tensor):
        entered.append(tensor.device)
        return real(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    attend(query, keys, values, runs, longest)
    assert entered == [query.device]


def test_rows_that_see_nothing_between_rows_that_do() -> None:
    query, keys, values, _, longest = case_of((3, 600, 4, 2, 16, 16), torch.float32)
    runs = runs_of(torch.tensor([0, 5, 300]), torch.tensor([600, 5, 310]), longest)
    out = attend(query, keys, values, runs, longest, 0.3)
    assert out[1].eq(0).all()
    torch.testing.assert_close(
        out.double(), by_hand(query, keys, values, runs, 0.3), rtol=0, atol=5e-6
    )
