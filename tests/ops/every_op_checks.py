"""What every op promises, each as one function of a case, a device and a dtype.

``RESULTS_BOUND`` is for cases that are not exact (see :class:`tests.ops.every_op.OpCase`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.ops.every_op import EVEN, ODD, Inputs, OpCase

# Roundings of two chained products of order one, whose sums may run in another order.
RESULTS_BOUND = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}
# Against another backend: roundings of the weights and of the output in attention, one elsewhere.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}
Capture = Callable[[Callable[[], Any]], tuple[Any, Any]]


def same(mine: Tensor, theirs: Tensor) -> None:
    """Equal values, NaN included."""
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def alike(mine: Tensor, theirs: Tensor, exact: bool) -> None:
    """Equal bits, or within the roundings of a product for what is not exact."""
    if exact or not mine.is_floating_point():
        same(mine, theirs)
        return
    bound = RESULTS_BOUND[theirs.dtype]
    # Gradients of weights add up rows.
    scale = max(1.0, float(theirs.nan_to_num().abs().amax())) if theirs.numel() else 1.0
    torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * scale, equal_nan=True)


def all_alike(case: OpCase, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """What two calls of :func:`with_gradients` returned."""
    results = len(theirs) - len(case.leaves)
    for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        alike(one, other, case.exact if index < results else case.exact_gradients)


def with_gradients(case: OpCase, t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The results, then the gradients of the leaves under a loss that weighs every value apart."""
    leaves = {name: t[name].detach().requires_grad_() for name in case.leaves}
    outputs = case.call({**t, **leaves})
    if not leaves:
        return outputs
    terms = [
        (out * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).nansum()
        for out in outputs
        if out.requires_grad
    ]
    gradients = torch.autograd.grad(sum(terms), list(leaves.values()), materialize_grads=True)
    return (*(out.detach() for out in outputs), *gradients)


def gradients_of(case: OpCase, results: Sequence[Tensor]) -> dict[str, Tensor]:
    """The last of what ``with_gradients`` returned, by leaf."""
    return dict(zip(case.leaves, results[len(results) - len(case.leaves) :], strict=True))


def part_of(case: OpCase, t: Mapping[str, Tensor], rows: slice | Tensor) -> Inputs:
    return {name: v[rows] if name in case.rows else v for name, v in t.items()}


def no_rows(case: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    t = case.inputs(0, device, dtype)
    some = with_gradients(case, case.inputs(3, device, dtype))
    results = with_gradients(case, t)
    for index, (mine, theirs) in enumerate(zip(results, some, strict=True)):
        assert mine.dtype == theirs.dtype
        if index in case.row_outputs:
            assert mine.shape == (0, *theirs.shape[1:])
    for name, grad in gradients_of(case, results).items():
        assert grad.shape == t[name].shape
        assert grad.eq(0).all()


def rows_alone(case: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    """One row, a few and all of them give every row the same result."""
    for sizes in (ODD, EVEN):
        t = case.inputs(70, device, dtype, sizes=sizes)
        whole = case.call(t)
        for rows in (slice(0, 1), slice(69, 70), slice(30, 47)):
            part = case.call(part_of(case, t, rows))
            for index in case.row_outputs:
                alike(part[index], whole[index][rows], case.exact)


def repeats(case: OpCase, device: torch.device, dtype: torch.dtype, rows: int = 3000) -> None:
    t = case.inputs(rows, device, dtype)
    first = with_gradients(case, t)
    for _ in range(3):
        for mine, theirs in zip(with_gradients(case, t), first, strict=True):
            same(mine, theirs)


def _strided(t: Tensor) -> Iterator[Tensor]:
    """The same values columns first, with gaps between rows, and off every alignment."""
    if t.ndim > 1:
        yield t.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.zeros(t.shape[0], 3, *t.shape[1:], dtype=t.dtype, device=t.device)
    wide[:, 1] = t
    yield wide[:, 1]
    yield torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def strides(case: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    for sizes in (ODD, EVEN):
        t = case.inputs(40, device, dtype, sizes=sizes)
        expected = with_gradients(case, t)
        for name in t:
            if name == "tables":
                continue
            for other in _strided(t[name]):
                got = with_gradients(case, {**t, name: other})
                all_alike(case, got, expected)


def one_row_for_all(case: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    """Rows of stride 0."""
    t = case.inputs(1, device, dtype)
    one = case.call(t)
    many = {n: v.expand(33, *v.shape[1:]) if n in case.rows else v for n, v in t.items()}
    results = case.call(many)
    for index in case.row_outputs:
        alike(results[index], one[index].expand_as(results[index]), case.exact)


def poison(case: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    """A broken row gives code -1 and NaN, no gradient, and leaves the others alone."""
    t = case.inputs(40, device, dtype)
    clean = with_gradients(case, t)
    bad = torch.tensor([3, 17, 39], device=device)
    good = torch.ones(40, dtype=torch.bool, device=device).index_fill(0, bad, False)
    for given in poisoned_inputs(case, t, bad):
        results = with_gradients(case, given)
        for index in case.row_outputs:
            out = results[index]
            alike(out[good], clean[index][good], case.exact)
            if out.is_floating_point():
                _poisoned(case, index, out[bad])
            else:
                assert out[bad].eq(-1).all()
        for name, grad in gradients_of(case, results).items():
            assert grad.isfinite().all(), name
            if name in case.rows:
                assert grad[bad].eq(0).all(), name


def poisoned_inputs(case: OpCase, t: Inputs, bad: Tensor) -> Iterator[Inputs]:
    """The inputs with some rows broken, in every way that breaks the op."""
    if case.op == "gated_merge":
        yield {**t, "codes": t["codes"].index_fill(0, bad, -1)}
        return
    first = case.rows[0]
    # An infinite query may still attend to something.
    for value in (torch.nan,) if case.op == "slot_attention" else (torch.nan, torch.inf):
        broken = t[first].clone()
        broken.flatten(1)[bad, min(5, broken[0].numel() - 1)] = value
        yield {**t, first: broken}


def _poisoned(case: OpCase, index: int, rows: Tensor) -> None:
    if case.op == "slot_attention":
        # Key heads apart: the broken entry is in the first query head alone.
        assert rows[:, 0].isnan().all()
        assert rows[:, 1:].isfinite().all()
    else:
        assert rows.isnan().all(), index


def equals_the_cpu(case: OpCase, device: torch.device, dtype: torch.dtype, rows: int = 500) -> None:
    """The CPU's codes, and its floats up to their rounding."""
    t = case.inputs(rows, torch.device("cpu"), dtype)
    expected = case.call(t)
    got = case.call({name: v.to(device) for name, v in t.items()})
    for mine, theirs in zip(got, expected, strict=True):
        if mine.is_floating_point():
            bound = RESULTS_BOUND[dtype] if not case.exact else ROUNDING[theirs.dtype]
            torch.testing.assert_close(mine.cpu(), theirs, rtol=bound, atol=bound, equal_nan=True)
        else:
            assert torch.equal(mine.cpu(), theirs)


def compiles(case: OpCase, device: torch.device, dtype: torch.dtype, backend: str) -> None:
    """Without a graph break, for any number of rows, forward and backward."""

    def doubled(t: Inputs) -> tuple[Tensor, ...]:
        return tuple(out * 2 if out.is_floating_point() else out for out in case.call(t))

    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend=backend, dynamic=True)
    for rows in (33, 70):
        t = case.inputs(rows, device, dtype)
        results = [with_gradients(replace(case, call=call), t) for call in (compiled, doubled)]
        all_alike(case, *results)


def opchecks(case: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    # Of one row any part counts as contiguous, and may share memory with another.
    for rows in (1, 40):
        t = case.inputs(rows, device, dtype)
        leaves = {name: t[name].clone().requires_grad_() for name in case.leaves}
        for op, args in case.raw({**t, **leaves}):
            torch.library.opcheck(op, args)


def captured(
    case: OpCase, device: torch.device, dtype: torch.dtype, capture: Capture, rows: int = 500
) -> None:
    """A replay follows new inputs and new seeds; the backward is captured with the forward."""
    t = case.inputs(rows, device, dtype)
    graph, results = capture(lambda: with_gradients(case, t))
    for seed in (1, 2):
        fresh = case.inputs(rows, device, dtype, seed=seed)
        for name, value in t.items():
            value.copy_(fresh[name])
        graph.replay()
        all_alike(case, results, with_gradients(case, fresh))


def streams(case: OpCase, device: torch.device, dtype: torch.dtype, rows: int = 500) -> None:
    """Inputs written late on a side stream are seen; two streams at once share no workspace."""
    given = [case.inputs(rows, device, dtype, seed=seed) for seed in (3, 4)]
    expected = [with_gradients(case, t) for t in given]
    late = {name: torch.zeros_like(v) for name, v in given[0].items()}
    with side_stream(device) as join:
        occupy(device)
        for name, value in late.items():
            value.copy_(given[0][name])
        results = with_gradients(case, late)
    join()
    all_alike(case, results, expected[0])

    made: list[Sequence[tuple[Tensor, ...]]] = []
    joins = []
    for t in given:
        with side_stream(device) as join:
            occupy(device)
            made.append([with_gradients(case, t) for _ in range(8)])
        joins.append(join)
    for join in joins:
        join()
    for runs, truth in zip(made, expected, strict=True):
        for run in runs:
            all_alike(case, run, truth)


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[Callable[[], None]]:
    """A stream of its own that starts after the current one; the value waits for it."""
    if device.type != "cuda":
        yield lambda: None
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream.synchronize


def occupy(device: torch.device) -> None:
    """Keep the current stream busy for some 10 ms."""
    if device.type == "cuda":
        torch.cuda._sleep(20_000_000)


def never_waits(case: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    """No synchronisation that torch knows of, forward or backward."""
    t = case.inputs(100, device, dtype)
    with_gradients(case, t)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(case, t)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def other_threads(case: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    """A thread that never chose a device gets the same results, and devices stay chosen."""
    t = case.inputs(100, device, dtype)
    expected = with_gradients(case, t)
    found: list[tuple[Tensor, ...]] = []
    threads = [
        threading.Thread(target=lambda: found.append(with_gradients(case, t))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    for results in found:
        all_alike(case, results, expected)


# Twice this is more than 2^31 elements, and for the narrowest dtype more than 2^32 bytes.
FAR = 2**30 + 2**29 + 8
FEW = {"K": 3, "D": 37, "I": 3}


def far_apart(case: OpCase, device: torch.device, dtype: torch.dtype, far: int = FAR) -> None:
    """Three rows, columns or heads lie more than 2^31 elements from first to last."""
    t = case.inputs(3, device, dtype, sizes=FEW)
    expected = with_gradients(case, t)
    for name, value in t.items():
        if name == "tables" or not value.is_floating_point():
            continue
        for dim in (d for d, size in enumerate(value.shape) if 1 < size <= 3):
            got = with_gradients(case, {**t, name: _spread(value, dim, far)})
            all_alike(case, got, expected)


def _spread(t: Tensor, dim: int, far: int) -> Tensor:
    """The same values with stride ``far`` along one dimension."""
    last = (t.shape[dim] - 1) * far
    stride = list(t.select(dim, 0).contiguous().stride())
    stride.insert(dim, far)
    wide = torch.empty(last + t.select(dim, 0).numel(), dtype=t.dtype, device=t.device)
    return wide.as_strided(t.shape, stride).copy_(t)


# What runs everywhere as it stands; the other functions need a capture or a compiler.
CHECKS: dict[str, Callable[[OpCase, torch.device, torch.dtype], None]] = {
    "no rows": no_rows,
    "rows alone": rows_alone,
    "repeats": repeats,
    "strides": strides,
    "one row for all": one_row_for_all,
    "poison": poison,
    "equals the CPU": equals_the_cpu,
    "opcheck": opchecks,
    "streams": streams,
    "never waits": never_waits,
    "other threads": other_threads,
}
