"""From rewards to advantages: leave-one-out, whitening, GAE, and the objects that use them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_rl.train.advantages import (
    STD_EPSILON,
    gae,
    leave_one_out_advantages,
    reward_scale,
    terminal_rewards,
    whiten,
)
from latent_rl.train.estimators import (
    AdvantageSettings,
    GeneralisedAdvantages,
    GroupCentred,
    LeaveOneOut,
    ScoredRollout,
    WhitenedReturns,
)

NAN = math.nan


def random_rollout(seed: int, *, groups: int = 3, size: int = 4, steps: int = 6) -> ScoredRollout:
    """Some completions dropped, some without a kept token, penalties and values everywhere."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    keep = torch.rand(rows, generator=generator) > 0.2
    lengths = torch.randint(0, steps + 1, (rows, 1), generator=generator)
    return ScoredRollout(
        rewards=torch.where(keep, normal(rows), NAN),
        keep_mask=keep,
        token_mask=(torch.arange(steps) < lengths) & keep[:, None],
        group_size=size,
        penalty=0.1 * normal(rows, steps),
        values=normal(rows, steps),
    )


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: A_t = sum_l (gamma lam)^l delta_{t+l}, of one completion without gaps."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    return [
        sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[t:]))
        for t in range(len(deltas))
    ]


def test_leave_one_out_worked_numbers():
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, NAN, 8.0])
    out = leave_one_out_advantages(rewards, 3, ~rewards.isnan())
    # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2; then 4 - 8 and 8 - 4 around the dropped one.
    assert out.tolist() == [-3.0, -1.5, 4.5, -4.0, 0.0, 4.0]
    alone = leave_one_out_advantages(torch.tensor([NAN, 5.0]), 2, torch.tensor([False, True]))
    assert alone.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"leave_one_out_advantages: .*group_size \(4\), got"):
        leave_one_out_advantages(rewards, 4)


def test_the_reward_stands_on_the_last_kept_token():
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    out = terminal_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    assert out.tolist() == [[0, 1, 0], [0, 2, 0], [0, 0, 0], [0, 0, 4]]


def test_gae_worked_numbers():
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.25, 0.5]])
    out = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.5)
    # deltas: .125 - .5, .25 - .25, 1 - .5; the factor gamma lam is .25.
    assert out.tolist() == [[-0.375 + 0.5 * 0.0625, 0.125, 0.5]]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_a_naive_loop_and_steps_over_gaps(seed, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 7, generator=generator) > 0.3
    out = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(4):
        kept = mask[row]
        naive = naive_gae(rewards[row, kept].tolist(), values[row, kept].tolist(), gamma, lam)
        torch.testing.assert_close(out[row, kept], torch.tensor(naive, dtype=torch.float64))
        assert out[row, ~kept].eq(0).all()


def test_whiten_is_over_the_mask_of_all_processes():
    generator = torch.Generator().manual_seed(0)
    values = 3 + 2 * torch.randn(6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) > 0.3
    white = whiten(values, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].std().item() == pytest.approx(1, abs=1e-6)
    assert white[~mask].eq(0).all()
    kept = whiten(values, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask], values[mask].mean() + white[mask])
    # Two processes that each hold a part see the same moments.
    halves = [slice(0, 2), slice(2, 6)]
    contributed: list[list[torch.Tensor]] = [[], []]
    for half in halves:
        sent = iter(contributed)
        whiten(values[half], mask[half], gather=lambda x, sent=sent: (next(sent).append(x), x)[1])
    total = torch.cat(contributed[0])
    mean = total[:, 1].sum() / total[:, 0].sum()
    square = sum((values[h][mask[h]].double() - mean).square().sum() for h in halves)
    for half in halves:
        sums = iter([total, square.reshape(1)])
        part = whiten(values[half], mask[half], gather=lambda x, sums=sums: next(sums))
        torch.testing.assert_close(part, white[half])


def test_a_penalty_is_part_of_the_reward():
    rollout = ScoredRollout(
        rewards=torch.tensor([1.0, 0.0]),
        keep_mask=torch.tensor([True, True]),
        token_mask=torch.tensor([[True, True, False], [True, True, True]]),
        group_size=2,
        penalty=torch.tensor([[0.5, 0.25, NAN], [0.25, 0.0, 0.25]]),
    )
    assert rollout.sequence_rewards().tolist() == [0.25, -0.5]
    assert rollout.token_rewards().tolist() == [[-0.5, 0.75, 0.0], [-0.25, 0.0, -0.25]]
    assert LeaveOneOut()(rollout).advantages.tolist() == [0.75, -0.75]
    assert GroupCentred(reward_scale("none"))(rollout).advantages.tolist() == [0.375, -0.375]


def test_normalised_advantages_are_trl_s():
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, NAN, 8.0])
    rollout = ScoredRollout(rewards, ~rewards.isnan(), torch.ones(6, 1, dtype=torch.bool), 3)
    plain = LeaveOneOut()(rollout).advantages
    made = LeaveOneOut(normalize=True)(rollout).advantages
    kept = plain[rollout.keep_mask]
    expected = (kept - kept.mean()) / (kept.std() + STD_EPSILON)
    torch.testing.assert_close(made[rollout.keep_mask], expected)
    assert made[4] == 0


def test_whitened_returns_worked_numbers():
    mask = torch.tensor([[True, True], [True, False]])
    penalty = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    rollout = ScoredRollout(torch.tensor([3.0, 1.0]), mask[:, 0], mask, 2, penalty)
    # Rewards to come: 3 - 1, 3 and 1; mean 2, unbiased std 1.
    out = WhitenedReturns()(rollout).advantages
    torch.testing.assert_close(out, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    # Less the group's mean reward 2: 0, 1 and -1, the same after whitening.
    based = WhitenedReturns(group_baseline=True)(rollout).advantages
    torch.testing.assert_close(based, out)


def test_the_group_baseline_removes_what_a_prompt_is_worth():
    mask = torch.ones(4, 1, dtype=torch.bool)
    rollout = ScoredRollout(torch.tensor([0.0, 1.0, 10.0, 11.0]), mask[:, 0], mask, 2)
    based = WhitenedReturns(group_baseline=True)(rollout).advantages[:, 0]
    torch.testing.assert_close(based[:2], based[2:])
    plain = WhitenedReturns()(rollout).advantages[:, 0]
    assert (plain[:2] < 0).all()
    assert (plain[2:] > 0).all()


def test_generalised_advantages_are_whitened_and_returns_are_not():
    rollout = random_rollout(1)
    made = GeneralisedAdvantages(gamma=0.9, lam=0.8)(rollout)
    kept = rollout.token_mask
    raw = gae(rollout.token_rewards(), rollout.values, kept, gamma=0.9, lam=0.8)
    torch.testing.assert_close(made.advantages, whiten(raw, kept))
    torch.testing.assert_close(made.returns[kept], (raw + rollout.values)[kept])
    # lam = 1: returns are the discounted rewards to come, whatever the values are.
    long = GeneralisedAdvantages(gamma=0.9, lam=1.0)(rollout).returns
    to_come = gae(rollout.token_rewards(), 0 * rollout.values, kept, gamma=0.9, lam=1.0)
    torch.testing.assert_close(long[kept], to_come[kept])
    scaled = GeneralisedAdvantages(whiten_rewards=True)(rollout).returns
    assert not torch.allclose(scaled, made.returns)
    with pytest.raises(ValueError, match="needs values, got None"):
        GeneralisedAdvantages()(
            ScoredRollout(rollout.rewards, rollout.keep_mask, rollout.token_mask, 4)
        )


ESTIMATORS = [
    GroupCentred(reward_scale("group")),
    GroupCentred(reward_scale("batch"), normalize=True),
    LeaveOneOut(),
    LeaveOneOut(normalize=True),
    WhitenedReturns(),
    WhitenedReturns(group_baseline=True),
    GeneralisedAdvantages(),
    GeneralisedAdvantages(whiten_rewards=True),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_dropped_completions_get_nothing_and_influence_nothing(estimator):
    rollout = random_rollout(2)
    dropped = ~rollout.keep_mask
    assert dropped.any()
    made = estimator(rollout)
    assert made.advantages.isfinite().all()
    assert made.advantages[dropped].eq(0).all()
    other = ScoredRollout(
        torch.where(dropped, 1e6, rollout.rewards),
        rollout.keep_mask,
        rollout.token_mask,
        rollout.group_size,
        torch.where(dropped[:, None], 1e6, rollout.penalty),
        torch.where(dropped[:, None], 1e6, rollout.values),
    )
    torch.testing.assert_close(estimator(other).advantages, made.advantages)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 10_000),
    st.floats(-20, 20),
    # "batch" divides by the spread of the raw rewards, which such a shift changes.
    st.sampled_from([ESTIMATORS[0], *ESTIMATORS[2:6]]),
)
def test_shifting_a_group_s_rewards_changes_nothing_where_a_group_is_the_baseline(
    seed, shift, estimator
):
    rollout = random_rollout(seed)
    shifts = torch.zeros(3, dtype=torch.float64)
    shifts[1] = shift
    grouped = isinstance(estimator, GroupCentred | LeaveOneOut) or estimator.group_baseline
    # Without a baseline by group only a shift of all rewards, of completions of one length, is
    # whitened away.
    mask = rollout.token_mask if grouped else rollout.keep_mask[:, None].expand(12, 6)
    moved = rollout.rewards + (shifts.repeat_interleave(4) if grouped else shift)
    made = [
        estimator(ScoredRollout(rewards, rollout.keep_mask, mask, 4)).advantages
        for rewards in (rollout.rewards, moved)
    ]
    torch.testing.assert_close(made[0], made[1], rtol=1e-6, atol=1e-6)


def test_settings_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got 1\.5"):
        AdvantageSettings(lam=1.5)
