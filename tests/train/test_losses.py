"""Policy losses: numbers worked out by hand, identities between the algorithms, masking."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_rl.train.losses import (
    ALGORITHMS,
    CHOICES,
    ClipRange,
    LossSettings,
    Normaliser,
    PolicyLoss,
    PolicyTerms,
    SequenceRatio,
    SoftGate,
    ValueTerms,
    algorithm,
    bnpo_loss,
    cispo_loss,
    dapo_loss,
    dr_grpo_loss,
    grpo_loss,
    gspo_loss,
    luspo_loss,
    ppo_loss,
    register_algorithm,
    reinforce_plus_plus_loss,
    rloo_loss,
    sapo_loss,
    value_loss,
    vespo_loss,
)

CLIP = ClipRange(0.2, 0.2)


def worked_terms(kl: bool = False) -> PolicyTerms:
    """Two completions of 3 and 1 tokens. Per token, with clip 0.2 on both sides:

    row 0, A = +1: ratios 1, 1.5 (clipped to 1.2), 0.5  ->  losses -1, -1.2, -0.5
    row 1, A = -1: ratio 0.5 (clipped to 0.8)           ->  loss 0.8
    """
    nan = math.nan
    ratios = torch.tensor([[1.0, 1.5, 0.5], [0.5, nan, nan]])
    return PolicyTerms(
        logprobs=ratios.log().requires_grad_(),
        old_logprobs=torch.zeros(2, 3),
        advantages=torch.tensor([1.0, -1.0]),
        keep_mask=torch.tensor([[True, True, True], [True, False, False]]),
        kl=torch.tensor([[0.1, 0.2, 0.3], [0.4, nan, nan]]) if kl else None,
    )


def random_terms(seed: int, lengths: list[int], shift: float = 0.5) -> PolicyTerms:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    old = -torch.rand(shape, generator=generator)
    new = old + shift * torch.randn(shape, generator=generator)
    keep = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    advantages = torch.randn(shape[0], generator=generator)
    # A value side without error, so that PPO's loss is its policy loss.
    value = ValueTerms(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape))
    return PolicyTerms(new.requires_grad_(), old, advantages, keep, value=value)


def loss_of(name: str, terms: PolicyTerms, max_length: int, clip: ClipRange = CLIP) -> PolicyLoss:
    entry = ALGORITHMS[name]
    level = {"gspo": SequenceRatio(), "luspo": SequenceRatio()}.get(name)
    if name == "cispo":  # its bound is the largest weight, not an offset from 1
        clip = ClipRange(clip.low, 1 + clip.high)
    settings = LossSettings(clip) if level is None else LossSettings(clip, ratio=level)
    normaliser = Normaliser(max_length, terms.keep_mask.sum().to(terms.logprobs.dtype))
    return entry.loss(terms, settings=settings, normaliser=normaliser)


def all_losses(terms: PolicyTerms, max_length: int) -> dict[str, torch.Tensor]:
    return {name: loss_of(name, terms, max_length).loss for name in ALGORITHMS}


def weights(name: str, terms: PolicyTerms, max_length: int) -> torch.Tensor:
    """What each algorithm gives a token: minus its gradient at ratio 1 and advantage 1, [B, T]."""
    keep = terms.keep_mask.float()
    rows, lengths = len(keep), keep.sum(1, keepdim=True)
    by_length = keep / lengths / rows
    by_tokens = keep / keep.sum()
    by_completion = keep / rows
    return {
        "grpo": by_length,
        "gspo": by_length,
        "sapo": by_length,
        "dr_grpo": keep / (rows * max_length),
        "rloo": by_completion,
        "luspo": by_completion,
    }.get(name, by_tokens)


def test_worked_numbers():
    terms = worked_terms()
    assert grpo_loss(terms, clip=CLIP).loss.item() == pytest.approx((-0.9 + 0.8) / 2)
    assert bnpo_loss(terms, clip=CLIP).loss.item() == pytest.approx(-1.9 / 4)
    dr = dr_grpo_loss(terms, max_completion_length=10, clip=CLIP)
    assert dr.loss.item() == pytest.approx(-1.9 / 20)
    dapo = dapo_loss(terms, num_tokens=torch.tensor(8.0), clip=CLIP)
    assert dapo.loss.item() == pytest.approx(-1.9 / 8)


def test_worked_clip_shares():
    out = grpo_loss(worked_terms(), clip=CLIP)
    assert out.high_clip.item() == pytest.approx(1 / 4)
    assert out.low_clip.item() == pytest.approx(1 / 4)


def test_worked_kl_term():
    # mean KL per completion: 0.2 and 0.4; beta 0.5 adds 0.5 * (0.2 + 0.4) / 2.
    out = grpo_loss(worked_terms(kl=True), clip=CLIP, beta=0.5)
    assert out.loss.item() == pytest.approx(-0.05 + 0.15)


def test_decoupled_upper_clip():
    terms = worked_terms()
    loss = dapo_loss(terms, num_tokens=torch.tensor(4.0), clip=ClipRange(0.2, 0.4)).loss
    assert loss.item() == pytest.approx((-1 - 1.4 - 0.5 + 0.8) / 4)
    default = dapo_loss(terms, num_tokens=torch.tensor(4.0)).loss
    assert default.item() == pytest.approx((-1 - 1.28 - 0.5 + 0.8) / 4)


def test_clipped_tokens_get_no_gradient_and_masked_nan_none():
    terms = worked_terms()
    bnpo_loss(terms, clip=CLIP).loss.backward()
    # d(-ratio * A)/dlogprob = -ratio * A where not clipped.
    expected = torch.tensor([[-1.0, 0.0, -0.5], [0.0, 0.0, 0.0]]) / 4
    torch.testing.assert_close(terms.logprobs.grad, expected)


def test_completions_share_one_ratio():
    # Geometric means: row 0 (1 * 1.5 * .5)^(1/3) = .9086, A = 1; row 1 .5, clipped to .8, A = -1.
    mean = 0.75 ** (1 / 3)
    out = gspo_loss(worked_terms(), clip=CLIP)
    assert out.loss.item() == pytest.approx((-mean + 0.8) / 2)
    assert out.low_clip.item() == pytest.approx(1 / 4)
    # The same per completion times its length, 3 and 1.
    longer = luspo_loss(worked_terms(), clip=CLIP)
    assert longer.loss.item() == pytest.approx((-3 * mean + 0.8) / 2)
    # RLOO takes products, not means: .75 is clipped below, which a positive advantage survives.
    whole = rloo_loss(worked_terms(), clip=CLIP)
    assert whole.loss.item() == pytest.approx((-0.75 + 0.8) / 2)
    assert (whole.low_clip.item(), whole.high_clip.item()) == (0.5, 0.0)
    # Its KL term is the sum over a completion: .6 and .4.
    penalised = rloo_loss(worked_terms(kl=True), clip=CLIP, beta=0.5)
    assert penalised.loss.item() == pytest.approx(0.025 + 0.25)


@pytest.mark.parametrize(
    ("name", "value"), [("grpo", -0.9), ("gspo", -(0.75 ** (1 / 3))), ("rloo", -0.75)]
)
def test_a_completion_without_a_kept_token_counts_as_zero(name, value):
    terms = worked_terms()
    keep = terms.keep_mask & torch.tensor([[True], [False]])
    out = loss_of(name, dataclasses.replace(terms, keep_mask=keep), 3)
    assert out.loss.item() == pytest.approx(value / 2)
    # A share of what is kept: RLOO's unit is the completion, which is not clipped away at A > 0.
    assert out.high_clip.item() == pytest.approx(1 / 3 if name == "grpo" else 0)


def test_gspo_s_own_clip_is_narrow():
    terms = random_terms(0, [4, 4], shift=0.01)
    assert gspo_loss(terms).low_clip + gspo_loss(terms).high_clip > 0
    assert grpo_loss(terms).low_clip + grpo_loss(terms).high_clip == 0


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    terms = worked_terms()
    out = cispo_loss(terms, num_tokens=torch.tensor(4.0), max_weight=1.2)
    # Weights 1, 1.2, .5 | .5; log-probabilities 0, log 1.5, log .5 | log .5.
    logs = torch.tensor([0.0, 1.5, 0.5, 0.5])
    by_token = -torch.tensor([0.0, 1.2 * logs[1].log(), 0.5 * logs[2].log(), -0.5 * logs[3].log()])
    assert out.loss.item() == pytest.approx(by_token.sum().item() / 4)
    assert out.high_clip.item() == pytest.approx(1 / 4)
    out.loss.backward()
    expected = torch.tensor([[-1.0, -1.2, -0.5], [0.5, 0.0, 0.0]]) / 4
    torch.testing.assert_close(terms.logprobs.grad, expected)


def test_sapo_worked_numbers():
    def gate(ratio: float, tau: float) -> float:
        return 4 / tau / (1 + math.exp(-tau * (ratio - 1)))

    out = sapo_loss(worked_terms(), gate=SoftGate(positive=1.0, negative=2.0))
    first = (gate(1.0, 1.0) + gate(1.5, 1.0) + gate(0.5, 1.0)) / 3
    assert out.loss.item() == pytest.approx((-first + gate(0.5, 2.0)) / 2)


def test_vespo_worked_numbers():
    out = vespo_loss(worked_terms(), num_tokens=torch.tensor(4.0))
    # w = .75 with k 2, lambda 3; w = .5 with k 3, lambda 2. Log-probabilities sum to log w.
    first = 0.75**2 * math.exp(3 * 0.25) * math.log(0.75)
    second = 0.5**3 * math.exp(2 * 0.5) * math.log(0.5)
    assert out.loss.item() == pytest.approx((-first + second) / 4)


def test_value_loss_worked_numbers():
    def tensor(*values: float) -> torch.Tensor:
        return torch.tensor([values])

    value = ValueTerms(
        tensor(1.0, 0.1, -1.0, math.nan), tensor(0.0, 0.0, 0.0, 0.0), tensor(2.0, 1.0, 0.5, 9.0)
    )
    keep = torch.tensor([[True, True, True, False]])
    loss, share = value_loss(value, keep, num_tokens=torch.tensor(3.0), cliprange_value=0.2)
    # max(1, 1.8^2), max(.9^2, .9^2), max(1.5^2, .7^2): only the first is clipped.
    assert loss.item() == pytest.approx(0.5 * (3.24 + 0.81 + 2.25) / 3)
    assert share.item() == pytest.approx(1 / 3)


def test_a_value_beyond_its_range_is_pulled_back_but_not_further_on():
    values = torch.tensor([[0.5, 0.5]], requires_grad=True)
    value = ValueTerms(values, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]))
    keep = torch.ones(1, 2, dtype=torch.bool)
    value_loss(value, keep, num_tokens=torch.tensor(2.0), cliprange_value=0.2)[0].backward()
    # Towards 1 it has moved far enough for this rollout; towards -1 it goes the wrong way.
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 0.75]]))


def test_ppo_adds_the_value_loss():
    terms = worked_terms()
    ones = torch.ones(2, 3)
    terms = dataclasses.replace(terms, value=ValueTerms(3 * ones, 3 * ones, ones))
    out = ppo_loss(terms, num_tokens=torch.tensor(4.0), clip=CLIP, vf_coef=0.1)
    assert out.loss.item() == pytest.approx(-1.9 / 4 + 0.1 * 0.5 * 4)
    assert out.metrics["loss/policy_avg"].item() == pytest.approx(-1.9 / 4)
    assert out.metrics["loss/value_avg"].item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"ppo_loss: terms\.value is needed, got None"):
        ppo_loss(worked_terms(), num_tokens=torch.tensor(4.0))


def test_advantages_may_differ_by_token():
    terms = dataclasses.replace(
        worked_terms(), advantages=torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.0, 0.0]])
    )
    out = reinforce_plus_plus_loss(terms, num_tokens=torch.tensor(4.0), clip=CLIP)
    assert out.loss.item() == pytest.approx((-1 - 1.0 + 0.8) / 4)
    with pytest.raises(ValueError, match=r"rloo_loss: advantages must be \[B\]"):
        rloo_loss(terms)
    wrong = dataclasses.replace(terms, advantages=torch.zeros(3))
    with pytest.raises(ValueError, match=r"advantages must be \(2,\) or \(2, 3\), got \(3,\)"):
        grpo_loss(wrong)


CLIPPED_BY_TOKEN = (
    "grpo", "dr_grpo", "dapo", "bnpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo",
)  # fmt: skip


@pytest.mark.parametrize("name", CLIPPED_BY_TOKEN)
def test_equal_full_lengths_make_the_variants_equal(name):
    terms = random_terms(0, [5, 5, 5])
    torch.testing.assert_close(loss_of(name, terms, 5).loss, loss_of("grpo", terms, 5).loss)
    # Dr. GRPO divides by a constant, here twice the length.
    if name == "dr_grpo":
        half = loss_of(name, terms, 10).loss
        torch.testing.assert_close(2 * half, loss_of("grpo", terms, 5).loss)


@pytest.mark.parametrize("name", ["gspo", "luspo", "rloo"])
def test_one_token_makes_completion_ratios_those_of_tokens(name):
    terms = random_terms(1, [1, 1, 1, 1])
    torch.testing.assert_close(loss_of(name, terms, 1).loss, loss_of("grpo", terms, 1).loss)


def test_gspo_is_grpo_at_the_level_of_completions():
    terms = random_terms(2, [3, 5, 1])
    grpo = grpo_loss(terms, clip=CLIP, ratio=SequenceRatio())
    torch.testing.assert_close(gspo_loss(terms, clip=CLIP).loss, grpo.loss)
    longer = luspo_loss(random_terms(2, [5, 5]), clip=CLIP).loss
    torch.testing.assert_close(longer, 5 * gspo_loss(random_terms(2, [5, 5]), clip=CLIP).loss)


def test_unequal_lengths_tell_the_variants_apart():
    losses = all_losses(random_terms(0, [2, 5, 4]), max_length=8)
    values = [losses[name].item() for name in ("grpo", "dr_grpo", "bnpo")]
    assert len({round(value, 4) for value in values}) == 3


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_on_policy_gradient_is_the_policy_gradient(name):
    terms = random_terms(3, [4, 2, 3], shift=0.0)
    out = loss_of(name, terms, 6)
    out.loss.backward()
    expected = -terms.advantages[:, None] * weights(name, terms, 6)
    torch.testing.assert_close(terms.logprobs.grad, expected)
    assert out.low_clip == out.high_clip == 0


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_clip_does_nothing_on_policy(name):
    grads = []
    # At a width of exactly 0 the loss has a kink at ratio 1.
    for clip in (ClipRange(1e-6, 1e-6), ClipRange(1.0, 9.0)):
        terms = random_terms(3, [4, 2], shift=0.0)
        loss_of(name, terms, 4, clip).loss.backward()
        grads.append(terms.logprobs.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", [*CLIPPED_BY_TOKEN, "gspo", "luspo", "rloo"])
def test_clipped_tokens_have_no_gradient(name):
    terms = random_terms(5, [3, 3, 3, 3], shift=1.0)
    out = loss_of(name, terms, 3)
    out.loss.backward()
    log_ratio = (terms.logprobs - terms.old_logprobs).detach()
    level = {"gspo": log_ratio.mean(1, True), "luspo": log_ratio.mean(1, True)}
    level["rloo"] = log_ratio.sum(1, True)
    ratio = level.get(name, log_ratio).exp().expand(4, 3)
    sign = terms.advantages[:, None]
    clipped = ((ratio < 0.8) & (sign < 0)) | ((ratio > 1.2) & (sign > 0))
    assert clipped.any()
    assert not clipped.all()
    assert (terms.logprobs.grad[clipped] == 0).all()
    assert (terms.logprobs.grad[~clipped] != 0).all()
    share = clipped[:, 0] if name == "rloo" else clipped
    assert (out.low_clip + out.high_clip).item() == pytest.approx(share.float().mean().item())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_padding_changes_nothing(seed, lengths):
    terms = random_terms(seed, lengths)
    pad = torch.nn.functional.pad
    padded = PolicyTerms(
        pad(terms.logprobs, (0, 3), value=math.nan),
        pad(terms.old_logprobs, (0, 3), value=-1e30),
        terms.advantages,
        pad(terms.keep_mask, (0, 3), value=False),
        value=ValueTerms(*(pad(v, (0, 3), value=math.nan) for v in (terms.value.values,) * 3)),
    )
    for name, loss in all_losses(padded, 9).items():
        torch.testing.assert_close(loss, all_losses(terms, 9)[name])


def test_no_kept_token_gives_a_zero_loss_with_a_gradient():
    terms = random_terms(0, [3, 3])
    empty = dataclasses.replace(terms, keep_mask=torch.zeros(2, 3, dtype=torch.bool))
    for loss in all_losses(empty, 4).values():
        assert loss.item() == 0
        assert loss.requires_grad


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_policy_far_away_gives_finite_gradients(name):
    """exp(100) is inf in float32; the gradient of what is clipped away would be 0 * inf."""
    terms = random_terms(0, [4, 4])
    for distance in (100.0, -100.0):
        for sign in (1.0, -1.0):
            logprobs = (terms.old_logprobs + distance).detach().requires_grad_()
            advantages = torch.full((2,), sign)
            out = loss_of(
                name, dataclasses.replace(terms, logprobs=logprobs, advantages=advantages), 4
            )
            out.loss.backward()
            assert logprobs.grad.isfinite().all()
            assert out.loss.isfinite()


def test_errors_name_the_argument():
    terms = worked_terms()
    with pytest.raises(ValueError, match=r"beta=0\.1 needs kl"):
        grpo_loss(terms, beta=0.1)
    wrong = PolicyTerms(terms.logprobs, torch.zeros(2, 2), terms.advantages, terms.keep_mask)
    with pytest.raises(ValueError, match="old_logprobs must have the shape"):
        grpo_loss(wrong)
    with pytest.raises(ValueError, match="low"):
        ClipRange(-0.1, 0.2)
    with pytest.raises(ValueError, match=r"delta must be > 1 \+ epsilon_high"):
        ClipRange(0.2, 0.2, 1.2)
    with pytest.raises(ValueError, match=r"vf_coef must be >= 0, got -1"):
        LossSettings(vf_coef=-1)


def test_registry_knows_its_names_and_guards_them():
    assert algorithm("dapo").name == "dapo"
    with pytest.raises(ValueError, match=r"loss_type must be one of .*'dr_grpo'.*got 'ppo2'"):
        algorithm("ppo2")
    with pytest.raises(ValueError, match="already registered"):
        register_algorithm(ALGORITHMS["grpo"])


def test_every_algorithm_reads_only_settings_there_are():
    for entry in ALGORITHMS.values():
        assert entry.choices <= CHOICES
        assert entry.min_generations in (1, 2)
