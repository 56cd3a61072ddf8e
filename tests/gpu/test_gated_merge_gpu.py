"""gated_merge on a CUDA device, both rows: the CPU's results, in graphs, on streams, repeatable."""

import pytest
import torch

from latent_rl import backends, ops

pytestmark = pytest.mark.gpu
# Roundings of chained products, relative to results of order one; float32 products may differ in
# their order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}
ROWS = (
    ("cuda", torch.float32),
    ("cuda", torch.bfloat16),
    ("cuda", torch.float16),
    ("triton", torch.bfloat16),
    ("triton", torch.float16),
)
# N, H, D, I, K
SHAPES = ((1, 8, 8, 16, 1), (37, 12, 7, 19, 5), (300, 64, 64, 200, 128), (1000, 256, 192, 520, 9))


@pytest.fixture(params=ROWS, ids=lambda row: f"{row[0]}-{row[1]}".replace("torch.", ""))
def dtype(request, monkeypatch):
    name, dtype = request.param
    monkeypatch.setenv("LATENT_RL_BACKEND", f"gated_merge={name}")
    return dtype


def inputs(shape, dtype, device):
    rows, hidden, width, inner, num_codes = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5

    codes = torch.randint(num_codes, (rows,), generator=generator)
    e = torch.randn(rows, hidden, generator=generator)
    codebook = torch.randn(num_codes, width, generator=generator)
    joined = hidden + width
    weights = normal(inner, joined), normal(inner, joined), normal(hidden, inner)
    tensors = [t.to(dtype) for t in (e, codebook, *weights)]
    return [t.to(device) for t in (tensors[0], codes, *tensors[1:])]


def merged(given, **stand_ins):
    leaves = [t.clone().requires_grad_() for t in (given[0], *given[2:])]
    extra = {name: t.clone().requires_grad_() for name, t in stand_ins.items()}
    out = ops.gated_merge(leaves[0], given[1], *leaves[1:], **extra)
    weight = torch.linspace(-1, 1, out.shape[1], device=out.device).to(out.dtype)
    loss = (out * weight).nansum()
    wanted = [*leaves, *extra.values()]
    return out, torch.autograd.grad(loss, wanted)


def reference(given, monkeypatch, **stand_ins):
    """In float64 on the CPU."""
    wide = [t.cpu().double() if t.is_floating_point() else t.cpu() for t in given]
    with monkeypatch.context() as patch:
        patch.setenv("LATENT_RL_BACKEND", "gated_merge=reference")
        return merged(wide, **{name: t.cpu().double() for name, t in stand_ins.items()})


def test_a_kernel_serves(cuda) -> None:
    assert backends.serving("gated_merge", cuda, torch.bfloat16) in ("cuda", "triton")


@pytest.mark.parametrize("stand_in", [None, "code_vectors", "code_probs"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(cuda, dtype, shape, stand_in, monkeypatch) -> None:
    given = inputs(shape, dtype, cuda)
    given[1][shape[0] // 2 + 1 :: 7] = -1
    stand_ins = {}
    if stand_in == "code_vectors":
        stand_ins[stand_in] = given[2][given[1].clamp(min=0)]
    if stand_in == "code_probs":
        one_hot = torch.nn.functional.one_hot(given[1].clamp(min=0), shape[4])
        stand_ins[stand_in] = one_hot.to(dtype)
    got, grads = merged(given, **stand_ins)
    exact, exact_grads = reference(given, monkeypatch, **stand_ins)
    bound = TOLERANCE[dtype]
    for mine, theirs in zip((got, *grads), (exact, *exact_grads), strict=True):
        assert mine.dtype == dtype
        # Gradients of weights add up N rows.
        scale = max(1.0, theirs.nan_to_num().abs().max().item())
        torch.testing.assert_close(
            mine.cpu().double(), theirs, rtol=bound, atol=bound * scale, equal_nan=True
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_with_tables_equals_the_block(cuda, dtype, shape, monkeypatch) -> None:
    given = inputs(shape, dtype, cuda)
    given[1][::5] = -1
    e, codes, codebook, *weights = given
    tables = ops.merge_tables(codebook, *weights[:2])
    got = ops.gated_merge_step(e, codes, tables, *weights)
    exact, _ = reference(given, monkeypatch)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(got.cpu().double(), exact, rtol=bound, atol=bound, equal_nan=True)


def test_bitwise_repeatable(cuda, dtype) -> None:
    given = inputs(SHAPES[3], dtype, cuda)
    first, first_grads = merged(given)
    for _ in range(3):
        again, grads = merged(given)
        for a, b in zip((first, *first_grads), (again, *grads), strict=True):
            assert torch.equal(a, b)


def test_a_graph_follows_its_inputs(cuda, dtype, capture) -> None:
    given = inputs(SHAPES[2], dtype, cuda)
    graph, (out, grads) = capture(lambda: merged(given))
    other = torch.randn_like(given[0])
    for source in (other, other.flip(0)):
        given[0].copy_(source)
        given[1].copy_(given[1].roll(1))
        graph.replay()
        expected, expected_grads = merged(given)
        for mine, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
            # cuBLAS may choose another algorithm while a graph is captured.
            torch.testing.assert_close(
                mine, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10
            )


def test_runs_on_the_current_stream(cuda, dtype) -> None:
    given = inputs(SHAPES[3], dtype, cuda)
    expected = ops.gated_merge(*given)
    e = torch.zeros_like(given[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        e.copy_(given[0])
        out = ops.gated_merge(e, *given[1:])
    side.synchronize()
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_on_a_device_that_is_not_current(other_cuda, dtype) -> None:
    given = inputs(SHAPES[2], dtype, other_cuda)
    out, grads = merged(given)
    assert all(t.device == other_cuda for t in (out, *grads))
    here = [t.to("cuda:0") for t in given]
    expected = merged(here)[0]
    torch.testing.assert_close(out.to("cuda:0"), expected)


def test_offsets_past_2_31(cuda, dtype) -> None:
    rows, inner = 140_000, 16_384
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 8 * rows * inner * 4:
        pytest.skip("needs 75 GB of device memory")
    given = inputs((8, 16, 16, inner, 4), dtype, cuda)
    long = [given[0].repeat(rows // 8, 1), given[1].repeat(rows // 8), *given[2:]]
    out, grads = merged(long)
    few, few_grads = merged(given)
    bound = TOLERANCE[dtype]
    for part in (out[-8:], out[:8]):
        torch.testing.assert_close(part, few, rtol=bound, atol=bound)
    torch.testing.assert_close(grads[0][-8:], few_grads[0], rtol=bound, atol=bound)
