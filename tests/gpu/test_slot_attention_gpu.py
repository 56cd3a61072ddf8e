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
    """Two rows share each prompt, which is up to half of what they see."""
    n, length, heads, key_heads, dim = size
    generator = torch.Generator().manual_seed(sum(size))
    prompts = (n + 1) // 2
    shapes = ((n, heads, dim), *[((prompts + n) * length, key_heads, dim)] * 2)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    ends = torch.randint(1, length + 1, (n,), generator=generator)
    begins = (torch.rand(n, generator=generator) * ends).long()
    row = torch.arange(n)
    shared = torch.randint(0, length // 2 + 1, (prompts,), generator=generator)[row // 2]
    own_at = (prompts + row) * length
    runs = torch.stack([begins, ends, row // 2 * length, shared, own_at], 1)
    return (*tensors, runs.to(device), length)


def attend(query, keys, values, runs, longest, scale=None):
    return ops.slot_attention(query, keys, values, runs, longest=longest, scale=scale)


def test_the_triton_kernel_serves(cuda) -> None:
    assert backends.serving("slot_attention", cuda) == "triton"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_equals_float64(cuda, size, dtype) -> None:
    args = case_of(size, dtype, cuda)
    out = attend(*args, 0.1)
    wide = [t.double() for t in args[:3]]
    expected = reference(*wide, *args[3:], 0.1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_a_row_is_independent_of_its_batch_and_of_the_longest(cuda) -> None:
    query, keys, values, runs, longest = case_of(SIZES[0], torch.bfloat16, cuda)
    runs[:, 0], runs[:, 1] = 0, 400
    whole = attend(query, keys, values, runs, longest)
    assert torch.equal(whole[9:11], attend(query[9:11], keys, values, runs[9:11], 400))
    assert torch.equal(attend(query, keys, values, runs, longest), whole)


def test_a_replayed_graph_sees_new_runs(cuda, capture) -> None:
    args = case_of(SIZES[0], torch.bfloat16, cuda)
    graph, out = capture(lambda: attend(*args))
    runs = args[3]
    runs[:, 0], runs[:, 1], runs[:, 3] = 0, 17, 9
    graph.replay()
    assert torch.equal(out, attend(*args[:3], runs.clone(), args[4]))


def test_runs_outside_the_storage_read_nothing_outside(cuda) -> None:
    query, keys, values, runs, longest = case_of(SIZES[2], torch.bfloat16, cuda)
    runs[0, 2:] = torch.tensor([-(1 << 40), 9, 1 << 40], device=cuda)
    assert attend(query, keys, values, runs, longest).isfinite().all()


def test_offsets_past_2_31(cuda) -> None:
    positions, dim = 40 * 32768, 1024
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 12 * positions * dim // 2:
        pytest.skip("needs 8 GB of device memory")
    store = torch.zeros(positions, 2, dim // 2, dtype=torch.bfloat16, device=cuda)
    store[-18:] = torch.randn(18, 2, dim // 2).to(store)
    query = torch.randn(1, 2, dim // 2).to(store)
    runs = torch.tensor([[0, 18, positions - 18, 9, positions - 9]], device=cuda)
    out = attend(query, store, store, runs, 18)
    last = store[-18:].double()
    near = torch.tensor([[0, 18, 0, 9, 9]], device=cuda)
    expected = reference(query.double(), last, last, near, 18, 512**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2**-6)
