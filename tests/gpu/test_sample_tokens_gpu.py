"""sample_tokens on a CUDA device: the CPU's tokens over a real vocabulary, in graphs too."""

import pytest
import torch

from latent_rl import backends, ops

pytestmark = pytest.mark.gpu
VOCABULARY = 151_936


def logits_of(rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * size)
    return (3 * torch.randn(rows, size, generator=generator)).to(dtype)


def test_the_cuda_kernel_serves(cuda) -> None:
    assert backends.serving("sample_tokens", cuda) == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "size"), [(300, 130), (8, VOCABULARY), (64, VOCABULARY)])
def test_tokens_equal_the_cpu_s(cuda, rows, size, dtype) -> None:
    logits = logits_of(rows, size, dtype)
    expected = ops.sample_tokens(logits, seed=3, offset=4)
    assert torch.equal(ops.sample_tokens(logits.to(cuda), seed=3, offset=4).cpu(), expected)


def test_scores_that_float32_cannot_order(cuda) -> None:
    logits = torch.full((32, 20_000), 2.0**20)
    expected = ops.sample_tokens(logits, seed=5)
    assert torch.equal(ops.sample_tokens(logits.to(cuda), seed=5).cpu(), expected)


def test_rows_without_a_distribution(cuda) -> None:
    logits = torch.zeros(4, 9000)
    logits[1, 3], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    tokens = ops.sample_tokens(logits.to(cuda), seed=0)
    assert (tokens.cpu() == -1).tolist() == [False, True, True, True]


def test_a_replayed_graph_draws_anew_and_can_be_reseeded(cuda, capture) -> None:
    logits = logits_of(64, 20_000, torch.bfloat16).to(cuda)
    seeds = ops.row_seeds(0, 64, cuda)
    offset = torch.zeros(64, dtype=torch.int64, device=cuda)
    graph, out = capture(lambda: ops.sample_tokens(logits, seed=seeds, offset=offset))
    for step in range(3):
        offset.fill_(step)
        graph.replay()
        assert torch.equal(out, ops.sample_tokens(logits, seed=seeds.clone(), offset=step))
    seeds.copy_(ops.row_seeds(9, 64, cuda))
    graph.replay()
    assert torch.equal(out, ops.sample_tokens(logits, seed=9, offset=2))


def test_runs_on_the_current_stream_and_another_device(cuda, other_cuda) -> None:
    logits = logits_of(64, 20_000, torch.float32)
    expected = ops.sample_tokens(logits, seed=1)
    side = torch.cuda.Stream(other_cuda)
    with torch.cuda.stream(side):
        got = ops.sample_tokens(logits.to(other_cuda), seed=1)
    side.synchronize()
    assert torch.equal(got.cpu(), expected)


def test_offsets_past_2_31(cuda) -> None:
    rows = 16_000
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 3 * rows * VOCABULARY:
        pytest.skip("needs 8 GB of device memory")
    logits = torch.zeros(rows, VOCABULARY, dtype=torch.bfloat16, device=cuda)
    logits[-2:] = logits_of(2, VOCABULARY, torch.bfloat16).to(cuda)
    seeds = ops.row_seeds(0, rows, cuda)
    last = ops.sample_tokens(logits, seed=seeds)[-2:]
    assert torch.equal(last, ops.sample_tokens(logits[-2:].clone(), seed=seeds[-2:]))
