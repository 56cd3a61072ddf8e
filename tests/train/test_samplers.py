"""Samplers."""

from __future__ import annotations

import pytest

from latent_rl.train.samplers import GroupedRepeatSampler, LengthGroupedSampler


def test_prompts_come_in_groups_and_chunks_repeat():
    sampler = GroupedRepeatSampler(
        5, group_size=3, prompts_per_chunk=2, repeat=2, seed=0, shuffle=False
    )
    chunk = [0, 0, 0, 1, 1, 1]
    other = [2, 2, 2, 3, 3, 3]
    assert list(sampler) == chunk + chunk + other + other
    assert len(sampler) == 24


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = GroupedRepeatSampler(64, group_size=1, prompts_per_chunk=4, repeat=1, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(2, 1)
    assert sorted(order(0, 1)) == list(range(64))


def test_same_order_as_trl_without_shuffling():
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is the oracle of this test")
    theirs = utils.RepeatSampler(
        list(range(7)), mini_repeat_count=2, batch_size=3, repeat_count=4, shuffle=False
    )
    ours = GroupedRepeatSampler(
        7, group_size=2, prompts_per_chunk=3, repeat=4, seed=0, shuffle=False
    )
    assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)


def test_too_few_prompts_is_an_error():
    with pytest.raises(ValueError, match="a rollout needs 4 prompts, the dataset has 3"):
        GroupedRepeatSampler(3, group_size=2, prompts_per_chunk=4, repeat=1, seed=0)


def test_length_groups_are_a_permutation_with_less_padding():
    lengths = [(7 * i) % 97 for i in range(203)]
    sampler = LengthGroupedSampler(lengths, 8, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(203))

    def padding(indices):
        batches = [indices[i : i + 8] for i in range(0, len(indices), 8)]
        return sum(
            max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches
        )

    assert padding(order) < 0.2 * padding(list(range(203)))
    sampler.set_epoch(1)
    assert list(sampler) != order
