"""nearest_code on a CUDA device: float64's codes, in graphs, on streams, bit for bit again."""

import pytest
import torch
from latent_rl.kernels.nearest_code import configs, triton_impl
from latent_rl.kernels.nearest_code.screen import add_product

from latent_rl import backends, ops
from tests.ops.search_cases import (
    METRICS,
    SIZES,
    TINY_SCALES,
    excess,
    hostile_searches,
    oracle,
    random_search,
    tiny_search,
)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, D, K): one tile of codes and several, resident and streamed rows, few and many of them.
SHAPES = (
    (8192, 2048, 128),
    (4096, 2048, 1000),
    (65536, 64, 1024),
    (40000, 256, 2048),
    (40000, 300, 300),
    (5, 4096, 8192),
    (130, 40, 8192),
    (1000, 1, 77),
)


def search(n, width, num_codes, dtype, device, offset=0.0):
    generator = torch.Generator(device).manual_seed(n + width + num_codes)
    x = torch.randn(n, width, generator=generator, device=device) + offset
    codebook = torch.randn(num_codes, width, generator=generator, device=device) + offset
    return x.to(dtype), codebook.to(dtype)


def check_nearest(x, codebook, codes, metric) -> None:
    """Against float64, 1024 rows at a time: equal but where float64 itself cannot tell."""
    for rows, mine in zip(x.split(1024), codes.split(1024), strict=True):
        wide, table = rows.double(), codebook.double()
        if metric == "l2":
            mean = table.mean(0)
            wide, table = wide - mean, table - mean
            value = table.square().sum(-1) - 2 * wide @ table.T + wide.square().sum(-1)[:, None]
        else:
            value = -(wide @ table.T)
            if metric == "cosine":
                value /= table.norm(dim=-1)
        lead = value.gather(1, mine[:, None])[:, 0] - value.amin(1)
        # A thousand roundings of float64 relative to the sums at hand.
        scale = wide.square().sum(-1) + table.square().sum(-1).amax()
        assert (lead <= 1e-13 * scale).all()


def test_triton_serves(cuda) -> None:
    assert backends.serving("nearest_code", cuda) == "triton"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_real_shapes_get_the_codes_of_float64(cuda, shape, dtype, metric) -> None:
    x, codebook = search(*shape, dtype, cuda)
    codes, distance = ops.nearest_code(x, codebook, metric, return_distance=True)
    check_nearest(x, codebook, codes, metric)
    assert distance.isfinite().all()
    assert torch.equal(ops.nearest_code(x, codebook, metric), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [8.0, 1000.0])
def test_data_far_from_the_origin(cuda, offset, dtype) -> None:
    x, codebook = search(4096, 256, 512, dtype, cuda, offset)
    check_nearest(x, codebook, ops.nearest_code(x, codebook), "l2")


def test_clusters_and_near_duplicates(cuda) -> None:
    x, centres = search(20000, 64, 32, torch.float32, cuda)
    codebook = (centres[:, None] + 1e-4 * x[: 32 * 16].view(32, 16, 64)).flatten(0, 1)
    rows = codebook[torch.randint(0, len(codebook), (20000,), device=cuda)] + 1e-5 * x
    check_nearest(rows, codebook, ops.nearest_code(rows, codebook), "l2")


def test_most_rows_are_decided_by_the_screen(cuda) -> None:
    # By the formulas of the bound 9.4, 3.5 and 1.4 % are not.
    for shape, dtype, share in (
        ((8192, 2048, 128), torch.float32, 0.15),
        ((65536, 64, 1024), torch.float32, 0.06),
        ((8192, 2048, 128), torch.bfloat16, 0.04),
    ):
        x, codebook = search(*shape, dtype, cuda)
        _, _, stats = triton_impl.nearest_code_with_stats(x[None], codebook[None], "l2")
        assert 0 < stats.fraction_reranked < share


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_small_searches_get_the_codes_of_the_oracle(cuda, size, dtype, metric) -> None:
    x, codebook = random_search(size, dtype)
    codes = ops.nearest_code(x.to(cuda), codebook.to(cuda), metric)
    assert torch.equal(codes.cpu(), oracle(x, codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hostile_searches(torch.float32))
def test_hostile_rows_get_a_nearest_code(cuda, name, dtype, metric) -> None:
    x, codebook = hostile_searches(dtype)[name]
    found = ops.nearest_code(x.to(cuda), codebook.to(cuda), metric, return_distance=True)
    codes, distance = (t.cpu() for t in found)
    expected = oracle(x, codebook, metric)
    assert torch.equal(codes < 0, expected < 0)
    assert torch.equal(distance.isnan(), expected < 0)
    scale = x.double().nan_to_num(0, 0, 0).square().sum(-1).amax()
    assert (excess(x, codebook, codes, metric) <= 1e-14 * (1 + scale)).all()


@pytest.mark.parametrize("scale", TINY_SCALES)
def test_scores_below_float32_are_searched_exactly(cuda, scale) -> None:
    x, codebook = tiny_search(scale, torch.float32)
    codes = ops.nearest_code(x.to(cuda), codebook.to(cuda))
    assert torch.equal(codes.cpu(), oracle(x[None], codebook[None], "l2")[0])


# the hardware the bound assumes


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, D: tl.constexpr):
    rows, d = tl.arange(0, 64), tl.arange(0, D)
    a = tl.load(a_ptr + rows[:, None] * D + d[None, :])
    b = tl.load(b_ptr + rows[None, :] * D + d[:, None])
    out = add_product(tl.zeros((64, 64), tl.float32), a, b)
    tl.store(out_ptr + rows[:, None] * 64 + rows[None, :], out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["same sign", "one large first", "cancelling", "uneven"])
def test_the_matrix_unit_keeps_the_bound_of_a_chain(cuda, pattern, dtype) -> None:
    width = 128
    generator = torch.Generator(cuda).manual_seed(0)
    a, b = torch.rand(2, 64, width, generator=generator, device=cuda) + 1
    if pattern == "one large first":
        # Everything after it is cut at its unit.
        a[:, 0], b[:, 0] = 2.0**6, 2.0**6
    elif pattern == "cancelling":
        a[:, 1::2] *= -1
    elif pattern == "uneven":
        a *= 2.0 ** torch.randint(-12, 1, a.shape, generator=generator, device=cuda)
    a, b = (t.bfloat16().to(dtype) for t in (a, b))
    out = torch.empty(64, 64, device=cuda)
    _product_kernel[(1,)](a, b, out, D=width)
    wide = a.double(), b.double()
    error = (out.double() - wide[0] @ wide[1].T).abs()
    assert (error <= width * 2.0**-22 * (wide[0].abs() @ wide[1].abs().T)).all()


# repeatability, graphs, streams, devices


def test_bitwise_repeatable_and_independent_of_the_batch(cuda) -> None:
    x, codebook = search(20000, 128, 700, torch.float32, cuda)
    first = ops.nearest_code(x, codebook, return_distance=True)
    for _ in range(3):
        again = ops.nearest_code(x, codebook, return_distance=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for some in (x[:7], x[5000:5100], x[-1:]):
        start = (some.data_ptr() - x.data_ptr()) // (4 * 128)
        codes, distance = ops.nearest_code(some, codebook, return_distance=True)
        assert torch.equal(codes, first[0][start : start + len(some)])
        assert torch.equal(distance, first[1][start : start + len(some)])


def test_the_codebook_split_over_programs_chooses_the_same(cuda) -> None:
    x, codebook = search(20000, 96, 4096, torch.bfloat16, cuda)
    machine = configs.machine_of(torch.device("cuda", torch.cuda.current_device()))
    config = configs.choose(machine.architecture, x.dtype, 64, 96)
    assert configs.splits_of(config, 1, 64, 4096, machine.processors) > 1
    assert torch.equal(ops.nearest_code(x[:64], codebook), ops.nearest_code(x, codebook)[:64])


def test_a_new_number_of_rows_compiles_nothing(cuda) -> None:
    kernel = triton_impl._nearest_code_screen_kernel
    x, codebook = search(40000, 64, 64, torch.bfloat16, cuda)
    ops.nearest_code(x[:33001], codebook)
    compiled = sum(len(cache[0]) for cache in kernel.device_caches.values())
    for n in (33002, 34000, 39999, 40000):
        ops.nearest_code(x[:n], codebook)
    assert sum(len(cache[0]) for cache in kernel.device_caches.values()) == compiled


def test_a_graph_follows_its_inputs(cuda, capture) -> None:
    x, codebook = search(3000, 64, 300, torch.float32, cuda)
    other = torch.randn_like(x)
    # All rows ambiguous: the captured launches must not have fixed how many are listed.
    halves = ((codebook[0] + codebook[1]) / 2).expand_as(x)
    graph, out = capture(lambda: ops.nearest_code(x, codebook, return_distance=True))
    for source in (other, halves, other.flip(0)):
        x.copy_(source)
        graph.replay()
        expected = ops.nearest_code(source.contiguous(), codebook, return_distance=True)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_runs_on_the_current_stream(cuda) -> None:
    source, codebook = search(4096, 64, 64, torch.float32, cuda)
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


def test_on_a_device_that_is_not_current(other_cuda) -> None:
    x, codebook = search(300, 64, 9, torch.float32, other_cuda)
    codes = ops.nearest_code(x, codebook)
    assert codes.device == other_cuda
    assert torch.equal(codes.cpu(), ops.nearest_code(x.cpu(), codebook.cpu()))


def test_strides_do_not_show(cuda) -> None:
    x, codebook = search(700, 48, 90, torch.float32, cuda)
    expected = ops.nearest_code(x, codebook)
    wide = torch.randn(700, 3, 48, device=cuda)
    wide[:, 1] = x
    shifted = torch.cat([torch.zeros(1, device=cuda), x.flatten()])[1:].view(700, 48)
    for other in (wide[:, 1], shifted, x.T.contiguous().T):
        assert torch.equal(ops.nearest_code(other, codebook), expected)


def test_offsets_past_2_31(cuda) -> None:
    rows, width = 5_000_000, 512
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 2 * rows * width * 2:
        pytest.skip("needs 10 GB of device memory")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=cuda)
    x[-1] = 3
    codebook = torch.tensor([0.0, 3.0], device=cuda)[:, None].expand(2, width).bfloat16()
    codes, distance = ops.nearest_code(x, codebook, return_distance=True)
    assert codes[-1].item() == 1
    assert codes.sum().item() == 1
    assert distance.eq(0).all()
