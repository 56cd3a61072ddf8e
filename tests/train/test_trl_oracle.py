"""TRL's GRPOTrainer._compute_loss as oracle for the values and gradients of our losses."""

from __future__ import annotations

import types
from collections import defaultdict

import pytest
import torch

from latent_rl.train.losses import (
    ALGORITHMS,
    ClipRange,
    GammaWeights,
    LossSettings,
    Normaliser,
    PolicyTerms,
    SoftGate,
    ratio_level,
)
from latent_rl.train.reward_shaping import soft_overlong_punishment

trl = pytest.importorskip("trl", reason="TRL is the oracle of this test and is not installed")

PROMPT, MAX_LENGTH = 5, 16
# Not the defaults, so that no default is compared with itself.
SAPO = SoftGate(positive=1.2, negative=1.7)
VESPO = GammaWeights(1.5, 2.5, 2.0, 1.0)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    old = -torch.rand(6, 9, generator=generator)
    lengths = torch.randint(2, 10, (6, 1), generator=generator)
    return {
        "old": old,
        "new": old + 0.4 * normal(6, 9),
        "ref": old + 0.2 * normal(6, 9),
        "advantages": normal(6),
        "keep": torch.arange(9) < lengths,
    }


def theirs(
    values: dict[str, torch.Tensor],
    loss_type: str,
    beta: float,
    level: str = "token",
    delta: float | None = None,
    high: float = 0.28,
) -> tuple[float, torch.Tensor]:
    logprobs = values["new"].clone().requires_grad_()
    accelerator = types.SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        gather_for_metrics=lambda x: x,
    )
    stub = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros(6, 9), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=high,
        use_vllm=False,
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=False,
            steps_per_generation=1,
            sapo_temperature_pos=SAPO.positive,
            sapo_temperature_neg=SAPO.negative,
            vespo_k_pos=VESPO.k_positive,
            vespo_lambda_pos=VESPO.lambda_positive,
            vespo_k_neg=VESPO.k_negative,
            vespo_lambda_neg=VESPO.lambda_negative,
        ),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        accelerator=accelerator,
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
        vllm_importance_sampling_correction=False,
    )
    batch = {
        "prompt_ids": torch.zeros(6, PROMPT, dtype=torch.long),
        "prompt_mask": torch.ones(6, PROMPT, dtype=torch.long),
        "completion_ids": torch.zeros(6, 9, dtype=torch.long),
        "completion_mask": values["keep"].long(),
        "advantages": values["advantages"],
        "old_per_token_logps": values["old"],
        "ref_per_token_logps": values["ref"],
        "num_items_in_batch": values["keep"].sum(),
    }
    loss = trl.GRPOTrainer._compute_loss(stub, None, batch)
    loss.backward()
    return loss.item(), logprobs.grad


def ours(
    values: dict[str, torch.Tensor],
    loss_type: str,
    beta: float,
    level: str = "token",
    delta: float | None = None,
    high: float = 0.28,
) -> tuple[float, torch.Tensor]:
    logprobs = values["new"].clone().requires_grad_()
    # TRL estimates the KL from samples; ours gets the same estimate so that the rest compares.
    difference = values["ref"] - logprobs
    terms = PolicyTerms(
        logprobs,
        values["old"],
        values["advantages"],
        values["keep"],
        difference.exp() - difference - 1 if beta else None,
    )
    normaliser = Normaliser(MAX_LENGTH, values["keep"].sum().float())
    settings = LossSettings(
        ClipRange(0.2, high, delta),
        beta,
        ratio_level(level),
        soft_gate=SAPO,
        gamma_weights=VESPO,
    )
    loss = ALGORITHMS[loss_type].loss(terms, settings=settings, normaliser=normaliser).loss
    loss.backward()
    return loss.item(), logprobs.grad


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_loss_and_gradient_equal_trl(loss_type, beta):
    values = inputs()
    their_loss, their_grad = theirs(values, loss_type, beta)
    our_loss, our_grad = ours(values, loss_type, beta)
    assert our_loss == pytest.approx(their_loss, rel=1e-6)
    # Same float32 formula in another order of operations: a few ulp.
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-8)
    assert their_grad.abs().max() > 0


@pytest.mark.parametrize(
    ("level", "delta"), [("sequence", None), ("token", 1.5), ("sequence", 1.3)]
)
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_ratios_of_completions_and_two_sided_clipping_equal_trl(loss_type, level, delta):
    values = inputs()
    # Further apart, so that whole completions are clipped and bounded too.
    values["new"] = values["old"] + 2 * (values["new"] - values["old"])
    their_loss, their_grad = theirs(values, loss_type, 0.05, level, delta)
    our_loss, our_grad = ours(values, loss_type, 0.05, level, delta)
    assert our_loss == pytest.approx(their_loss, rel=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-8)
    plain, _ = theirs(values, loss_type, 0.05)
    assert their_loss != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(
    ("loss_type", "level", "high"),
    [
        ("cispo", "token", 1.3),
        ("cispo", "sequence", 1.1),
        ("sapo", "token", 0.28),
        ("luspo", "sequence", 0.05),
        ("luspo", "token", 0.28),
        ("vespo", "token", 0.28),
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_further_losses_equal_trl(loss_type, level, high, beta):
    values = inputs()
    their_loss, their_grad = theirs(values, loss_type, beta, level, high=high)
    our_loss, our_grad = ours(values, loss_type, beta, level, high=high)
    assert our_loss == pytest.approx(their_loss, rel=2e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-8)
    assert their_grad.abs().max() > 0


def test_gspo_is_trl_s_grpo_by_sequence():
    values = inputs()
    their_loss, their_grad = theirs(values, "grpo", 0.0, "sequence", high=0.05)
    our_loss, our_grad = ours(values, "gspo", 0.0, "sequence", high=0.05)
    assert our_loss == pytest.approx(their_loss, rel=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-8)
    assert (their_grad.abs().sum(1) == 0).any()  # some completion is clipped


def test_rloo_equals_trl_s_rloo_trainer():
    values = inputs()
    logprobs = values["new"].clone().requires_grad_()
    accelerator = types.SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x)
    stub = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros(6, 9), None),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.28,
        model=types.SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics={"train": defaultdict(list)},
    )
    keep = values["keep"]
    batch = {
        "prompt_ids": torch.zeros(6, PROMPT, dtype=torch.long),
        "prompt_mask": torch.ones(6, PROMPT, dtype=torch.long),
        "completion_ids": torch.zeros(6, 9, dtype=torch.long),
        "completion_mask": keep.long(),
        "advantages": values["advantages"],
        "old_logps": (values["old"] * keep).sum(1),
    }
    their_loss = trl.RLOOTrainer._compute_loss(stub, None, batch)
    their_loss.backward()
    our_loss, our_grad = ours(values, "rloo", 0.0)
    assert our_loss == pytest.approx(their_loss.item(), rel=1e-6)
    torch.testing.assert_close(our_grad, logprobs.grad, rtol=1e-5, atol=1e-8)
    assert (our_grad.abs().sum(1) == 0).any()
    assert (our_grad.abs().sum(1) > 0).any()


def test_the_overlong_punishment_is_trl_s():
    from trl.rewards import get_soft_overlong_punishment

    for limit, cache in ((20, 5), (20, 20), (20, 1)):
        lengths = list(range(1, 25))
        theirs = get_soft_overlong_punishment(limit, cache)([[0] * n for n in lengths])
        made = soft_overlong_punishment(
            torch.tensor(lengths), max_completion_length=limit, cache=cache
        )
        assert made.tolist() == pytest.approx(theirs)
