"""Percentiles, turns and rounds, on clocks and contestants that are made up."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ceilings, timing
from benchmarks.ring import MIN_ROUNDS, SLOW_MS, SLOW_ROUNDS, interleave
from benchmarks.worker import Failed, Ready


def test_percentiles_and_spread() -> None:
    found = timing.summarise([float(n) for n in range(1, 102)])
    assert (found.median_ms, found.p20_ms, found.p25_ms, found.p80_ms) == (51, 21, 26, 81)
    assert found.samples == 101
    assert found.spread == pytest.approx((81 - 21) / 26)


@pytest.mark.parametrize(
    ("call_ms", "calls"), [(0.0, 64), (0.1, 64), (1.0, 40), (19.0, 2), (25.0, 1), (9999.0, 1)]
)
def test_a_turn_lasts_about_as_long_whatever_the_call(call_ms: float, calls: int) -> None:
    assert timing.calls_per_turn(call_ms) == calls


class TestTurn:
    def test_short_calls_get_an_untimed_one_first(self) -> None:
        calls: list[str] = []
        times = timing.turn(lambda: calls.append("call"), lambda call: call() or 2.0, 15.0)
        assert times == [2.0, 2.0]
        assert len(calls) == 3

    def test_a_long_call_is_timed_at_once(self) -> None:
        calls: list[str] = []
        assert timing.turn(lambda: calls.append("call"), lambda call: call() or 2.0, 41.0) == [2.0]
        assert len(calls) == 1

    def test_no_garbage_is_collected_inside_and_it_is_again_after_a_failure(self) -> None:
        seen: list[bool] = []

        def fail() -> None:
            seen.append(gc.isenabled())
            raise RuntimeError

        with pytest.raises(RuntimeError):
            timing.turn(fail, lambda call: call() or 1.0, 41.0)
        assert seen == [False]
        assert gc.isenabled()


def test_the_host_clock_counts_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: Iterator[float] = iter([1.0, 1.25])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    assert timing.host_clock(lambda: None) == 250.0


class Fake:
    """A contestant whose turns advance a made-up clock."""

    def __init__(self, name: str, log: list[str], seconds: float, fails_at: int = -1) -> None:
        self.name, self.log, self.seconds, self.fails_at = name, log, seconds, fails_at
        self.turns = 0

    def turn(self, call_ms: float) -> list[float] | Failed:
        self.log.append(self.name)
        self.turns += 1
        Fake.now += self.seconds
        if self.turns == self.fails_at:
            return Failed("OutOfMemoryError: no more")
        return [1000 * self.seconds]

    now = 0.0


def race(call_ms: dict[str, float], *, rounds: int = 20, budget_s: float = 1e9, **fails: int):
    Fake.now = 0.0
    log: list[str] = []
    handles = {n: Fake(n, log, ms / 1000, fails.get(n, -1)) for n, ms in call_ms.items()}
    ready = {n: Ready(ms, 0.0) for n, ms in call_ms.items()}
    samples = interleave(handles, ready, rounds=rounds, budget_s=budget_s, now=lambda: Fake.now)
    return samples, log


class TestInterleave:
    def test_every_round_has_everyone_once_in_rotating_order(self) -> None:
        samples, log = race({"a": 1.0, "b": 2.0, "c": 3.0}, rounds=3)
        assert log == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
        assert samples == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}

    def test_the_budget_ends_it_after_five_rounds_at_least(self) -> None:
        samples, _ = race({"a": 100.0, "b": 100.0}, budget_s=0.0)
        assert len(samples["a"]) == MIN_ROUNDS
        samples, _ = race({"a": 100.0, "b": 100.0}, budget_s=1.5)
        assert len(samples["a"]) == 8

    def test_slow_ones_leave_early(self) -> None:
        samples, _ = race({"a": 1.0, "slow": SLOW_MS + 1}, rounds=6)
        assert len(samples["slow"]) == SLOW_ROUNDS
        assert len(samples["a"]) == 6

    def test_a_disturbed_warm_up_makes_nobody_slow(self) -> None:
        log: list[str] = []
        handle = Fake("a", log, 0.1)
        samples = interleave({"a": handle}, {"a": Ready(SLOW_MS + 1, 0.0)}, rounds=6, budget_s=1e9)
        assert len(samples["a"]) == 6

    def test_one_that_fails_takes_no_more_turns(self) -> None:
        samples, log = race({"a": 1.0, "b": 1.0}, rounds=6, b=2)
        assert samples["b"] == Failed("OutOfMemoryError: no more")
        assert log.count("b") == 2
        assert len(samples["a"]) == 6

    def test_nobody_is_nothing(self) -> None:
        assert race({}) == ({}, [])


def test_roofs_are_the_best_of_a_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 4.0, 5.0, 4.5, 8.0, 8.0, 8.0])
    monkeypatch.setattr(ceilings, "clock_for", lambda device, own_stream: lambda call: next(times))
    assert ceilings.best_ms(lambda: None, torch.device("cpu")) == 4.0


def test_roofs_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1000})
    monkeypatch.setattr(ceilings, "GEMM_SIDE", {"cpu": 10})
    monkeypatch.setattr(ceilings, "best_ms", lambda call, device: (call(), 2.0)[1])
    found = ceilings.measure_ceilings(torch.device("cpu"), (torch.float32, torch.bfloat16))
    # Read and written bytes both count; a multiply-add is two operations.
    assert found["copy_gb_per_s"] == pytest.approx(2 * 1000 / 2e-3 / 1e9)
    assert found["gemm_gflop_per_s"] == pytest.approx(
        dict.fromkeys(("float32", "bfloat16"), 2 * 10**3 / 2e-3 / 1e9)
    )


def test_a_captured_call_keeps_its_inputs_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads addresses: freed inputs would be read all the same, or not be there."""
    replays = []
    graph = SimpleNamespace(replay=lambda: replays.append(1))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda held: nullcontext())
    inputs = torch.zeros(3)
    alive = weakref.ref(inputs)
    replay, remark = timing.captured(functools.partial(torch.sum, inputs), torch.device("cpu"))
    del inputs
    gc.collect()
    assert remark == "CUDA graph"
    assert alive() is not None
    assert replay() is None
    assert replays == [1]
