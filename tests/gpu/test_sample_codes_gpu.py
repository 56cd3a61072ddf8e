"""sample_codes on a CUDA device: the CPU's codes, in graphs, on streams, bit for bit again."""

import pytest
import torch

from latent_rl import backends, ops

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 32, "top_p": 0.95},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
)


def logits_of(rows: int, num_codes: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * num_codes)
    return (2 * torch.randn(rows, num_codes, generator=generator)).to(dtype)


def test_the_cuda_kernel_serves(cuda) -> None:
    assert backends.serving("sample_codes", cuda) == "cuda"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_codes", [1, 7, 64, 130, 1000, 8192])
def test_codes_equal_the_cpu_s(cuda, num_codes, dtype, options) -> None:
    logits = logits_of(300, num_codes, dtype)
    expected = ops.sample_codes(logits, seed=3, offset=4, **options)
    got = ops.sample_codes(logits.to(cuda), seed=3, offset=4, **options)
    assert torch.equal(got.codes.cpu(), expected.codes)
    # float64 inside on both sides; one rounding to float32 may differ.
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-7, atol=2e-7)


def test_many_draws_equal_the_cpu_s(cuda) -> None:
    logits = logits_of(1, 128, torch.float32).expand(200_000, 128)
    expected = ops.sample_codes(logits, seed=77, top_k=100).codes
    assert torch.equal(ops.sample_codes(logits.to(cuda), seed=77, top_k=100).codes.cpu(), expected)


def test_rows_without_a_distribution(cuda) -> None:
    logits = torch.zeros(4, 10)
    logits[1, 3], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    out = ops.sample_codes(logits.to(cuda), seed=0)
    assert (out.codes.cpu() == -1).tolist() == [False, True, True, True]
    assert out.logprob.isnan().tolist() == [False, True, True, True]


def test_a_replayed_graph_draws_anew_and_can_be_reseeded(cuda, capture) -> None:
    logits = logits_of(64, 128, torch.float32).to(cuda)
    seeds = ops.row_seeds(0, 64, cuda)
    offset = torch.zeros((), dtype=torch.int64, device=cuda)
    graph, out = capture(lambda: ops.sample_codes(logits, seed=seeds, offset=offset))
    for step in range(3):
        offset.fill_(step)
        graph.replay()
        assert torch.equal(
            out.codes, ops.sample_codes(logits, seed=seeds.clone(), offset=step).codes
        )
    seeds.copy_(ops.row_seeds(9, 64, cuda))
    graph.replay()
    assert torch.equal(out.codes, ops.sample_codes(logits, seed=9, offset=2).codes)


def test_runs_on_the_current_stream(cuda) -> None:
    logits = torch.zeros(4096, 128, device=cuda)
    source = logits_of(4096, 128, torch.float32).to(cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        logits.copy_(source)
        codes = ops.sample_codes(logits, seed=0).codes
    side.synchronize()
    assert torch.equal(codes, ops.sample_codes(source, seed=0).codes)


def test_on_a_device_that_is_not_current(other_cuda) -> None:
    logits = logits_of(64, 128, torch.float32)
    got = ops.sample_codes(logits.to(other_cuda), seed=0)
    assert got.codes.device == other_cuda
    assert torch.equal(got.codes.cpu(), ops.sample_codes(logits, seed=0).codes)


def test_bitwise_repeatable_and_independent_of_the_batch(cuda) -> None:
    logits = logits_of(1000, 130, torch.bfloat16).to(cuda)
    seeds = ops.row_seeds(1, 1000, cuda)
    whole = ops.sample_codes(logits, top_p=0.9, seed=seeds)
    again = ops.sample_codes(logits, top_p=0.9, seed=seeds)
    part = ops.sample_codes(logits[300:317], top_p=0.9, seed=seeds[300:317])
    for a, b, c in zip(whole, again, part, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[300:317], c)


def test_offsets_past_2_31(cuda) -> None:
    rows, num_codes = 300_000, 8192
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 3 * rows * num_codes:
        pytest.skip("needs 8 GB of device memory")
    logits = torch.zeros(rows, num_codes, dtype=torch.bfloat16, device=cuda)
    logits[-1] = logits_of(1, num_codes, torch.bfloat16)[0].to(cuda)
    seeds = ops.row_seeds(0, rows, cuda)
    last = ops.sample_codes(logits, seed=seeds).codes[-1]
    assert last == ops.sample_codes(logits[-1:], seed=seeds[-1:]).codes[0]
