"""The accounts of a run, and the sweep that tunes every arm alike."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import TrainerControl, TrainerState

from latent_rl.train import ArmJob, LatentGRPOConfig, Spending, SpendingMeter, spending_of, sweep
from latent_rl.train.arms import ArmRun, Sweep, late_reward

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("time.perf_counter", lambda: now.seconds)
    return now


def flushed(meter: SpendingMeter, steps: int = 1, gather=lambda x: x) -> dict[str, float]:
    return meter.flush(steps, gather, CPU)


class TestMeter:
    def test_a_rollout_inside_a_step_is_no_update(self, clock):
        meter = SpendingMeter()
        with meter.step():
            clock.seconds += 1
            with meter.rollout():
                clock.seconds += 5
                meter.count(8, 40)
            clock.seconds += 2
        with meter.step():
            clock.seconds += 4
        logs = flushed(meter, steps=2)
        assert logs["spent/rollout_seconds"] == logs["rollout_seconds"] == 5
        assert logs["spent/update_seconds"] == logs["update_seconds"] == 7
        assert (logs["spent/completions"], logs["spent/generated_tokens"]) == (8, 40)
        assert logs["spent/optimizer_steps"] == 2

    def test_seconds_are_per_rollout_since_the_last_log_and_totals_go_on(self, clock):
        meter = SpendingMeter()
        for seconds in (2, 4):
            with meter.rollout():
                clock.seconds += seconds
        assert flushed(meter)["rollout_seconds"] == 3
        with meter.rollout():
            clock.seconds += 10
        logs = flushed(meter)
        assert (logs["rollout_seconds"], logs["spent/rollout_seconds"]) == (10, 16)
        assert "rollout_seconds" not in flushed(meter)

    def test_counts_are_those_of_all_processes(self):
        meter = SpendingMeter()
        meter.count(2, 10)
        logs = flushed(meter, gather=lambda x: torch.cat([x, x + 1]))
        assert (logs["spent/completions"], logs["spent/generated_tokens"]) == (5, 21)

    def test_a_resumed_run_goes_on_from_its_last_log(self, tmp_path):
        args = LatentGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        meter = SpendingMeter()
        meter.count(99, 99)
        state = TrainerState()
        state.log_history = [{"spent/completions": 16, "spent/generated_tokens": 70}]
        meter.on_train_begin(args, state, TrainerControl())
        meter.count(8, 30)
        logs = flushed(meter)
        assert (logs["spent/completions"], logs["spent/generated_tokens"]) == (24, 100)

    def test_memory_counts_from_the_beginning_of_training(self, tmp_path):
        args = LatentGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        meter = SpendingMeter()
        assert "spent/peak_memory_bytes" not in flushed(meter)
        before = torch.ones(64 << 20, dtype=torch.uint8)
        del before
        meter.on_train_begin(args, TrainerState(), TrainerControl())
        first = flushed(meter).get("spent/peak_memory_bytes")
        if first is None:
            pytest.skip("this system does not let a process reset its peak memory")
        held = torch.ones(64 << 20, dtype=torch.uint8)
        assert flushed(meter)["spent/peak_memory_bytes"] >= first + (32 << 20)
        assert held.numel() == 64 << 20

    def test_totals_are_read_from_the_last_entry_that_has_them(self):
        history = [
            {"spent/completions": 8, "spent/generated_tokens": 30, "spent/rollout_seconds": 1.5},
            {"spent/completions": 16, "spent/generated_tokens": 70, "spent/rollout_seconds": 2.5},
            {"train_runtime": 3.0},
        ]
        assert spending_of(history) == Spending(16, 70, 2.5)
        with pytest.raises(ValueError, match="spent/completions"):
            spending_of([{"loss": 1.0}])


class FakeArm:
    """An arm whose reward depends on the learning rate alone, through no training."""

    def __init__(self, name: str, best: float) -> None:
        self.name, self.best = name, best
        self.seen: list[tuple[float, int, str]] = []

    def trainer(self, job, args, callbacks):
        self.seen.append((args.learning_rate, args.seed, args.output_dir))
        reward = -abs(args.learning_rate - self.best) + 0.01 * args.seed
        history = [{"reward": reward, "spent/completions": 8, "spent/generated_tokens": 30}]
        return types.SimpleNamespace(
            train=lambda resume_from_checkpoint: None,
            state=types.SimpleNamespace(log_history=history),
            remove_callback=lambda callback: None,
        )


class TestSweep:
    def test_every_arm_runs_the_same_grid(self, tmp_path):
        arms = [FakeArm("latent", 0.3), FakeArm("token", 0.1)]
        args = LatentGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        job = ArmJob([], [], None)
        found = sweep(arms, job, args, learning_rates=[0.1, 0.3], seeds=[0, 1])
        grid = [(0.1, 0), (0.1, 1), (0.3, 0), (0.3, 1)]
        for arm in arms:
            assert [(rate, seed) for rate, seed, _ in arm.seen] == grid
            assert len({out for _, _, out in arm.seen}) == 4
        assert len(found.runs) == 8
        assert found.best() == {"latent": 0.3, "token": 0.1}
        assert found.means()["latent"][0.1] == pytest.approx(-0.195)
        table = found.table()
        assert table.count("\n") == 9
        assert "| latent | 0.3 (best) | 0 |" in table
        assert "| token | 0.3 | 1 |" in table

    def test_a_tie_goes_to_the_lower_rate(self):
        runs = tuple(ArmRun("a", rate, 0, (1.0,), Spending()) for rate in (0.3, 0.1))
        assert Sweep(runs).best() == {"a": 0.1}

    def test_the_score_is_the_end_of_the_curve(self):
        run = ArmRun("a", 0.1, 0, (0.0,) * 6 + (0.4, 0.8), Spending())
        assert late_reward(run) == pytest.approx(0.6)
        assert late_reward(ArmRun("a", 0.1, 0, (0.5,), Spending())) == 0.5
        with pytest.raises(
            ValueError, match=r"the a run of learning rate 0\.1 .* set logging_steps"
        ):
            late_reward(ArmRun("a", 0.1, 0, (), Spending()))

    def test_an_empty_grid_and_equal_names_are_refused(self, tmp_path):
        args = LatentGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        job = ArmJob([], [], None)
        with pytest.raises(ValueError, match="must not be empty"):
            sweep([FakeArm("a", 1)], job, args, learning_rates=[], seeds=[0])
        with pytest.raises(ValueError, match="different names"):
            sweep([FakeArm("a", 1)] * 2, job, args, learning_rates=[0.1], seeds=[0])
