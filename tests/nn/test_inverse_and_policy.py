"""Who sees what: the inverse model one token ahead, the policy the past alone."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl.models.towers import make_tower
from latent_rl.nn import InverseDynamics, LatentPolicy
from tests.tiny_models import HIDDEN, tiny_vlm

LENGTH, AT = 9, 4


def tower() -> torch.nn.Module:
    torch.manual_seed(0)
    decoder = tiny_vlm("llava").model.get_decoder()
    return make_tower(decoder, 2, dtype=torch.float32, init_from_backbone=True)


def moved(output: Tensor, other: Tensor) -> list[int]:
    """Positions that changed."""
    return (output - other).abs().amax((0, 2)).gt(1e-6).nonzero()[:, 0].tolist()


def test_inverse_feature_at_t_sees_exactly_through_t_plus_one() -> None:
    inverse = InverseDynamics(tower(), HIDDEN, 7)
    state = torch.randn(1, LENGTH, HIDDEN)
    changed = state.clone()
    changed[:, AT] += 1.0
    before, after = inverse(state, {}), inverse(changed, {})
    assert before.shape == (1, LENGTH, 7)
    # Position AT - 1 explains token AT, so it is the first to see e_AT.
    assert moved(before, after) == list(range(AT - 1, LENGTH - 1))
    assert not before[:, -1].any()


def test_policy_at_t_sees_exactly_through_t() -> None:
    policy = LatentPolicy(tower(), HIDDEN, 7)
    state = torch.randn(1, LENGTH, HIDDEN)
    changed = state.clone()
    changed[:, AT] += 1.0
    before, after = policy(state, {}), policy(changed, {})
    assert moved(before, after) == list(range(AT, LENGTH))
    torch.testing.assert_close(policy(state, {}, last_only=True), before[:, -1:])


def test_untrained_policy_is_close_to_uniform() -> None:
    logits = LatentPolicy(tower(), HIDDEN, 16)(torch.randn(2, LENGTH, HIDDEN), {})
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    assert (entropy > 0.95 * torch.log(torch.tensor(16.0))).all()
