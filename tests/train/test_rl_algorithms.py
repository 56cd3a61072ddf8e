"""Every algorithm in the trainer: what moves, what is scored, where the clip acts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from latent_rl import ops
from latent_rl.train import ALGORITHMS, register_algorithm
from latent_rl.train.estimators import Estimate, ScoredRollout
from latent_rl.train.losses import Defaults, PolicyLoss
from latent_rl.train.replay import action_logits, action_outputs
from latent_rl.train.scoring import score_update
from tests.train.test_rl_trainer import even_tokens, logged, make
from tests.train.tiny_world import moved, snapshot

IN_REWARD = ("rloo", "reinforce_plus_plus", "ppo")
CLIPPING = ("gspo", "cispo", "rloo", "reinforce_plus_plus", "ppo", "luspo")


def first_replay(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_only_the_policy_and_its_value_head_move(tmp_path, name):
    trainer, model = make(
        tmp_path, loss_type=name, max_steps=3, num_iterations=2, max_resample_rounds=0
    )
    before = snapshot(model)
    trainer.train()
    names = moved(before, model)
    assert "latent.policy.head.weight" in names
    assert any(n.startswith("latent.policy.tower.") for n in names)
    values = {n for n in names if n.startswith("value_head.")}
    assert names - values == {n for n in names if n.startswith("latent.policy.")}
    assert bool(values) == (name == "ppo")
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    assert all(value == 0.01 for value in logged(trainer, "beta"))
    assert logged(trainer, "kl")[-1] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "rloo"},
        {"loss_type": "cispo"},
        {"loss_type": "reinforce_plus_plus"},
        {"loss_type": "ppo"},
        {"loss_type": "ppo", "detach_value": False, "beta": 0.02, "vf_coef": 1.0},
    ],
    ids=str,
)
def test_the_reward_rises(tmp_path, changes):
    trainer, _ = make(
        tmp_path,
        **{
            "max_steps": 25,
            "per_device_train_batch_size": 32,
            "num_generations": 8,
            "beta": 0.0,
            "generation_kwargs": {"min_new_tokens": 6},
            **changes,
        },
    )
    start = trainer.evaluate()["eval_reward"]
    trainer.train()
    # Measured .52 -> .76 to .84; the group noise of an evaluation is about .03.
    assert trainer.evaluate()["eval_reward"] > start + 0.12


@dataclasses.dataclass(frozen=True)
class BestOfGroup:
    """An estimator of one's own: 1 for the best of each group, 0 for the rest."""

    def __call__(self, rollout: ScoredRollout) -> Estimate:
        rewards = rollout.rewards.masked_fill(~rollout.keep_mask, -torch.inf)
        grouped = rewards.view(-1, rollout.group_size)
        best = grouped == grouped.amax(1, keepdim=True)
        return Estimate((best.float() * (grouped > -torch.inf)).reshape(-1))


@dataclasses.dataclass(frozen=True)
class CloneTheBest:
    """An algorithm of one's own, with an estimator of its own."""

    name: str = "clone_the_best"
    defaults: Defaults = dataclasses.field(default_factory=Defaults)
    choices: frozenset[str] = frozenset()
    min_generations: int = 2
    uses_values: bool = False

    def estimator(self, settings):
        return BestOfGroup()

    def loss(self, terms, *, settings, normaliser):
        likelihood = torch.where(terms.keep_mask, terms.logprobs, 0.0)
        loss = -(terms.advantages[:, None] * likelihood).sum() / normaliser.num_tokens
        none = torch.zeros_like(loss.detach())
        return PolicyLoss(loss, none, none, {"cloned": terms.advantages.mean()})


def test_an_algorithm_of_one_s_own_is_an_object(tmp_path):
    register_algorithm(CloneTheBest())
    try:
        trainer, model = make(tmp_path, loss_type="clone_the_best", max_steps=2)
        before = snapshot(model)
        trainer.train()
        with pytest.raises(ValueError, match="epsilon means nothing to loss_type 'clone_the_best'"):
            make(tmp_path, loss_type="clone_the_best", epsilon=0.1)
    finally:
        del ALGORITHMS["clone_the_best"]
    assert "latent.policy.head.weight" in moved(before, model)
    assert all(value >= 0.25 for value in logged(trainer, "cloned"))


# bnpo divides by the tokens of a micro-batch, on purpose.
@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"bnpo"}))
def test_four_micro_batches_make_the_step_of_one(tmp_path, name):
    heads = []
    for size, accumulation in ((16, 1), (4, 4)):
        trainer, model = make(
            tmp_path / str(size),
            loss_type=name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            beta=0.1,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            max_resample_rounds=0,
            # Completions of various lengths, so that divisors differ between micro-batches.
            generation_kwargs={"eos_token_id": list(range(5, 60, 2))},
        )
        before = model.latent.policy.head.weight.detach().clone()
        trainer.train()
        heads.append(model.latent.policy.head.weight.detach() - before)
    assert heads[0].abs().max() > 1e-5
    torch.testing.assert_close(heads[1], heads[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", CLIPPING)
def test_clipping_acts_over_several_epochs(tmp_path, name):
    # Ratios of completions hardly move, gspo's clip is narrow; cispo's weight needs a lower bound.
    narrow = {"epsilon_high": 1.05} if name == "cispo" else {}
    trainer, _ = make(
        tmp_path, loss_type=name, num_iterations=3, max_steps=3, learning_rate=3e-2, **narrow
    )
    trainer.train()
    ratios = logged(trainer, "clip_ratio")
    assert ratios[0] == 0  # the first pass is on policy
    assert max(ratios[1:]) > 0


def test_group_free_algorithms_take_one_completion_per_prompt(tmp_path):
    for name in ("reinforce_plus_plus", "ppo"):
        trainer, model = make(
            tmp_path / name,
            loss_type=name,
            num_generations=1,
            per_device_train_batch_size=8,
            max_steps=2,
        )
        before = snapshot(model)
        trainer.train()
        assert "latent.policy.head.weight" in moved(before, model)
    with pytest.raises(ValueError, match=r"num_generations must be >= 2 \(an advantage is"):
        make(tmp_path, loss_type="rloo", num_generations=1)


TRUNCATIONS = [
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.5},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("name", ["gspo", "rloo", "ppo"])
def test_what_was_sampled_is_what_is_scored_in_every_epoch(tmp_path, name, truncation):
    trainer, model = make(tmp_path, loss_type=name, num_iterations=3, beta=0.05, **truncation)
    with torch.no_grad():  # a policy with preferences, so that truncation bites
        model.latent.policy.head.weight.mul_(20)
    replay = first_replay(trainer)
    keep = replay.keep_mask
    assert not replay.support[keep].all()
    assert trainer.averages.flush()["sampling/sampling_logp_difference/mean"] < 1e-5
    policy, distribution = model.latent.policy, trainer.args.distribution()
    outputs = action_outputs(policy, replay, trainer.value_head)
    terms, _ = score_update(outputs, replay, distribution)
    torch.testing.assert_close(terms.logprobs[keep], replay.old_logprobs[keep], rtol=0, atol=1e-5)
    with torch.no_grad():
        policy.head.weight.add_(0.2 * torch.randn_like(policy.head.weight))
    terms, _ = score_update(
        action_outputs(policy, replay, trainer.value_head), replay, distribution
    )
    with torch.no_grad():
        scaled = action_logits(policy, replay) / distribution.temperature
        inside = scaled.masked_fill(~replay.support, -torch.inf).log_softmax(-1)
        expected = inside.gather(-1, replay.codes.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(terms.logprobs[keep], expected[keep], rtol=1e-5, atol=1e-5)
    assert expected[keep].isfinite().all()
    assert ((terms.logprobs - replay.old_logprobs)[keep].abs() > 1e-3).any()


@pytest.mark.parametrize("truncation", [{}, {"temperature": 0.7, "top_k": 4}], ids=str)
def test_the_penalty_in_the_reward_is_the_log_ratio_under_what_was_sampled(
    tmp_path, truncation, monkeypatch
):
    seen = []
    original = ScoredRollout.sequence_rewards
    monkeypatch.setattr(
        ScoredRollout, "sequence_rewards", lambda self: (seen.append(self), original(self))[1]
    )
    trainer, model = make(tmp_path, loss_type="rloo", beta=0.5, num_iterations=2, **truncation)
    with torch.no_grad():
        model.latent.policy.head.weight.mul_(20)
    replay = first_replay(trainer)
    distribution = trainer.args.distribution()
    ratio = []
    with torch.no_grad():
        for policy in (model.latent.policy, trainer.reference):
            logits = distribution.scaled_logits(action_logits(policy, replay), replay.support)
            ratio.append(ops.code_logprobs(logits, replay.codes).logprob)
    expected = torch.where(replay.keep_mask, 0.5 * (ratio[0] - ratio[1]), 0.0)
    # The replay is the rollout in another order of rows.
    order = trainer._replay.seeds.argsort()
    penalty = torch.where(seen[0].token_mask, seen[0].penalty, 0.0)[order]
    torch.testing.assert_close(penalty, expected[replay.seeds.argsort()], rtol=1e-4, atol=1e-5)
    assert penalty.abs().max() > 0.1


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_kl_is_in_the_loss_or_in_the_reward_and_not_in_both(tmp_path, name):
    losses = {}
    for beta in (1e-6, 10.0):
        trainer, model = make(tmp_path, loss_type=name, beta=beta, max_resample_rounds=0)
        with torch.no_grad():
            model.latent.policy.head.weight.mul_(20)
        replay = first_replay(trainer)
        plain = trainer.args.loss_settings(trainer.regularisation.beta)
        assert plain.beta == (0.0 if name in IN_REWARD else beta)
        losses[beta] = replay.advantages, trainer.compute_loss(model, replay).item()
    same = torch.allclose(losses[1e-6][0], losses[10.0][0], atol=1e-4)
    assert same == (name not in IN_REWARD)


def test_kl_in_reward_can_be_chosen(tmp_path):
    for name, chosen in (("grpo", True), ("ppo", False)):
        trainer, _ = make(tmp_path, loss_type=name, kl_in_reward=chosen)
        assert trainer.args.puts_kl_in_reward() == chosen
        first_replay(trainer)


def test_a_value_head_learns_what_the_prompt_tells(tmp_path):
    """A reward by prompt alone: values can explain it, and nothing is left for the policy."""

    def by_prompt(completions, answer, **columns):
        return [float(a % 3 > 0) for a in answer]  # row a says "one" a % 3 times

    trainer, _ = make(
        tmp_path,
        by_prompt,
        loss_type="ppo",
        beta=0.0,
        vf_coef=1.0,
        cliprange_value=10.0,
        detach_value=False,
        max_steps=30,
        learning_rate=3e-3,
    )
    trainer.train()
    known = [v for v in logged(trainer, "val/explained_variance") if not math.isnan(v)]
    assert known[0] == pytest.approx(0, abs=1e-6)
    assert sum(known[-5:]) / 5 > 0.5  # measured .88
    assert logged(trainer, "loss/value_avg")[-1] < logged(trainer, "loss/value_avg")[0]


def test_the_value_loss_leaves_the_tower_alone_unless_told(tmp_path):
    gradients = {}
    for detach in (True, False):
        trainer, model = make(tmp_path, loss_type="ppo", beta=0.0, detach_value=detach)
        torch.nn.init.ones_(trainer.value_head.linear.weight)
        replay = first_replay(trainer)
        for coefficient in (0.0, 1.0):
            trainer.args.vf_coef = coefficient
            model.zero_grad()
            trainer.compute_loss(model, replay).backward()
            tower = [p.grad for p in model.latent.policy.tower.parameters() if p.grad is not None]
            gradients[detach, coefficient] = torch.cat([g.flatten() for g in tower])
    assert torch.equal(gradients[True, 0.0], gradients[True, 1.0])
    assert not torch.allclose(gradients[False, 0.0], gradients[False, 1.0], atol=1e-4)


def test_values_stay_float32_under_mixed_precision(tmp_path):
    trainer, _ = make(tmp_path, loss_type="ppo", bf16=True, max_steps=2, num_iterations=2)
    trainer.train()
    assert trainer.value_head.linear.weight.dtype == torch.float32
    assert trainer._replay.old_values.dtype == trainer._replay.returns.dtype == torch.float32
    assert all(math.isfinite(value) for value in logged(trainer, "loss/value_avg"))


def test_a_saved_model_holds_no_value_head(tmp_path):
    from latent_rl.models import LatentActionModel

    trainer, model = make(tmp_path, loss_type="ppo", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    again = LatentActionModel.from_pretrained(tmp_path / "model", model.backbone)
    assert not hasattr(again, "value_head")
    assert moved(snapshot(model.latent.policy), again.latent.policy) == set()


def test_failed_rewards_stay_out_of_every_algorithm(tmp_path):
    def judge(completion_ids, **columns):
        scores = even_tokens(completion_ids)
        scores[0] = math.nan
        scores[4:8] = [TimeoutError("no answer")] * 4
        return scores

    for name in ("rloo", "reinforce_plus_plus", "ppo"):
        trainer, _ = make(tmp_path / name, judge, loss_type=name, max_steps=2)
        replay = trainer._new_replay(next(iter(trainer.get_train_dataloader())), 0)
        lost = [0, 4, 5, 6, 7]
        assert replay.advantages[lost].eq(0).all()
        assert not replay.keep_mask[lost].any()
        assert replay.advantages.isfinite().all()
        trainer.train()
        assert all(math.isfinite(value) for value in logged(trainer, "loss"))
