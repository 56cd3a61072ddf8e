"""slot_attention on a CUDA device: parity at real sizes, graphs, streams, bits."""

import pytest
import torch

from latent_rl import backends, ops
from latent_rl.reference.slot_attention import slot_attention as reference

pytestmark = pytest.mark.gpu
# Rounding of the weights to the values' dtype before the second product, and of the output.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-8}
# (N, L, Hq, Hk, D): Qwen2.5-VL-3B, many heads, a narrow odd one.
SIZES = ((64, 1000, 16, 2, 128), (3, 300, 32, 32, 64), (5, 77, 6, 2, 20))


def case_of(size, dtype, device):
    n, length, heads, key_heads, dim = size
    generator = torch.Generator().manual_seed(sum(size))
    tensors = [
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((n, heads, dim), (n, length, key_heads, dim), (n, length, key_heads, dim))
    ]
    ends = torch.randint(1, length + 1, (n,), generator=generator)
    begins = (torch.rand(n, generator=generator) * ends).long()
    return (*tensors, begins.to(device), ends.to(device))


def test_the_triton_kernel_serves(cuda) -> None:
    assert backends.serving("slot_attention", cuda) == "triton"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_equals_float64(cuda, size, dtype) -> None:
    args = case_of(size, dtype, cuda)
    out = ops.slot_attention(*args, scale=0.1)
    wide = [t.double() for t in args[:3]]
    expected = reference(*wide, *args[3:], 0.1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_a_row_is_independent_of_its_batch_and_of_its_slot_s_end(cuda) -> None:
    query, keys, values, _, _ = case_of(SIZES[0], torch.bfloat16, cuda)
    begins, ends = torch.zeros(64, device=cuda).long(), torch.full((64,), 400, device=cuda)
    whole = ops.slot_attention(query, keys, values, begins, ends)
    part = ops.slot_attention(query[9:11], keys[9:11, :400], values[9:11, :400], *[
        t[9:11] for t in (begins, ends)
    ])  # fmt: skip
    assert torch.equal(whole[9:11], part)
    assert torch.equal(ops.slot_attention(query, keys, values, begins, ends), whole)


def test_a_replayed_graph_sees_new_ranges(cuda, capture) -> None:
    query, keys, values, begins, ends = case_of(SIZES[0], torch.bfloat16, cuda)
    graph, out = capture(lambda: ops.slot_attention(query, keys, values, begins, ends))
    begins.zero_()
    ends.fill_(17)
    graph.replay()
    expected = ops.slot_attention(query, keys, values, begins.clone(), ends.clone())
    assert torch.equal(out, expected)


def test_offsets_past_2_31(cuda) -> None:
    slots, length, dim = 40, 32768, 1024
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 12 * slots * length * dim // 2:
        pytest.skip("needs 8 GB of device memory")
    store = torch.zeros(slots, length, 2, dim // 2, dtype=torch.bfloat16, device=cuda)
    store[-1, -9:] = torch.randn(9, 2, dim // 2).to(store)
    query = torch.randn(slots, 2, dim // 2).to(store)
    begins = torch.full((slots,), length - 9, device=cuda)
    ends = torch.full((slots,), length, device=cuda)
    out = ops.slot_attention(query, store, store, begins, ends)
    last = store[-1:, -9:].contiguous()
    zero, nine = begins[:1] * 0, begins[:1] * 0 + 9
    expected = reference(query[-1:].double(), last.double(), last.double(), zero, nine, 512**-0.5)
    torch.testing.assert_close(out[-1:].double(), expected, rtol=0, atol=2**-6)
