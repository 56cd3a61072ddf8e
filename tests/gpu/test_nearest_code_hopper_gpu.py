"""nearest_code with its screen in CUDA C++ for Hopper, where it is asked for: float64's codes."""

import pytest
import torch
from latent_rl.kernels.nearest_code import hopper_impl, triton_impl

from latent_rl import backends, ops
from tests.gpu.test_nearest_code_gpu import check_nearest, search
from tests.ops.search_cases import METRICS, excess, hostile_searches, oracle

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)
# (N, D, K): one to four chunks of columns, ragged tiles, fewer tiles than processors and more.
SHAPES = (
    (65536, 64, 1024),
    (100_000, 256, 8192),
    (40000, 256, 2048),
    (40001, 136, 300),
    (34567, 72, 77),
    (40000, 37, 131),
    (5, 192, 8192),
    (1000, 8, 1),
)


@pytest.fixture(autouse=True)
def hopper(cuda, monkeypatch) -> None:
    request = backends.Request(cuda, torch.bfloat16, 64)
    if reason := dict(backends.explain("nearest_code", request))["hopper"]:
        pytest.skip(f"hopper {reason}")
    monkeypatch.setenv("LATENT_RL_BACKEND", "nearest_code=hopper")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_real_shapes_get_the_codes_of_float64(cuda, shape, dtype, metric) -> None:
    x, codebook = search(*shape, dtype, cuda)
    codes, distance = ops.nearest_code(x, codebook, metric, return_distance=True)
    check_nearest(x, codebook, codes, metric)
    assert distance.isfinite().all()
    assert torch.equal(ops.nearest_code(x, codebook, metric), codes)


def test_it_lists_no_more_rows_than_triton(cuda) -> None:
    for shape in ((65536, 64, 1024), (40000, 256, 8192)):
        x, codebook = search(*shape, torch.bfloat16, cuda)
        found = hopper_impl.nearest_code_with_stats(x[None], codebook[None], "l2")
        theirs = triton_impl.nearest_code_with_stats(x[None], codebook[None], "l2")
        assert torch.equal(found[0], theirs[0])
        assert 0 < found[2].fraction_reranked <= theirs[2].fraction_reranked


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hostile_searches(torch.float32))
def test_hostile_rows_get_a_nearest_code(cuda, name, dtype, metric) -> None:
    x, codebook = hostile_searches(dtype)[name]
    if x.shape[-1] > 256:
        pytest.skip("wider than it takes")
    codes = ops.nearest_code(x.to(cuda), codebook.to(cuda), metric).cpu()
    assert torch.equal(codes < 0, oracle(x, codebook, metric) < 0)
    scale = x.double().nan_to_num(0, 0, 0).square().sum(-1).amax()
    assert (excess(x, codebook, codes, metric) <= 1e-14 * (1 + scale)).all()


def test_groups_and_rows_that_lie_apart(cuda) -> None:
    x = torch.randn(3, 500, 40, device=cuda).bfloat16()
    codebook = torch.randn(3, 200, 40, device=cuda).bfloat16()
    expected = torch.stack([ops.nearest_code(*pair) for pair in zip(x, codebook, strict=True)])
    wide = torch.randn(3, 500, 3, 40, device=cuda).bfloat16()
    wide[:, :, 1] = x
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (x, wide[:, :, 1], swapped, x.mT.contiguous().mT):
        assert torch.equal(ops.nearest_code(other, codebook), expected)


def test_bitwise_repeatable(cuda) -> None:
    x, codebook = search(50_000, 128, 700, torch.bfloat16, cuda)
    first = ops.nearest_code(x, codebook)
    for _ in range(20):
        assert torch.equal(ops.nearest_code(x, codebook), first)
    assert torch.equal(ops.nearest_code(x[5000:5100], codebook), first[5000:5100])


def test_a_graph_follows_its_inputs(cuda, capture) -> None:
    x, codebook = search(3000, 64, 300, torch.bfloat16, cuda)
    graph, out = capture(lambda: ops.nearest_code(x, codebook))
    for source in (torch.randn_like(x), codebook[:1].expand_as(x)):
        x.copy_(source)
        graph.replay()
        assert torch.equal(out, ops.nearest_code(source.contiguous(), codebook))


def test_runs_on_the_current_stream(cuda) -> None:
    source, codebook = search(4096, 64, 64, torch.bfloat16, cuda)
    expected = ops.nearest_code(source, codebook)
    x = torch.zeros_like(source)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(source)
        codes = ops.nearest_code(x, codebook)
    side.synchronize()
    assert torch.equal(codes, expected)


def test_offsets_past_2_31(cuda) -> None:
    rows, width = 10_000_000, 256
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 2 * rows * width * 2:
        pytest.skip("needs 10 GB of device memory")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=cuda)
    x[-1] = 3
    codebook = torch.tensor([0.0, 3.0], device=cuda)[:, None].expand(2, width).bfloat16()
    codes = ops.nearest_code(x, codebook)
    assert codes[-1].item() == 1
    assert codes.sum().item() == 1
