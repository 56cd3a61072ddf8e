"""LatentGRPOTrainer: it learns, moves only the policy, and treats failures honestly."""

from __future__ import annotations

import math

import pytest
import torch

from latent_rl import ops
from latent_rl.train import LatentGRPOConfig, LatentGRPOTrainer
from latent_rl.train.replay import action_logits
from tests.train.test_stage_trainer import StopAt
from tests.train.tiny_world import moved, prompts, snapshot, tiny_model


def even_tokens(completion_ids, **columns):
    """Share of even token ids: a dense reward that any prompt can raise."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def config(path, **changes) -> LatentGRPOConfig:
    settings = {
        "output_dir": str(path),
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    return LatentGRPOConfig(**{**settings, **changes})


def make(path, reward=even_tokens, *, act=0.3, rows=8, callbacks=None, **changes):
    model, processor = tiny_model(act=act)
    data = prompts(rows)
    trainer = LatentGRPOTrainer(
        model, reward, config(path, **changes), data, data, processor, callbacks=callbacks
    )
    return trainer, model


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "changes",
    [{"loss_type": "grpo"}, {"loss_type": "dr_grpo", "num_iterations": 2, "max_steps": 60}],
    ids=["grpo", "dr_grpo-2-iterations"],
)
def test_the_reward_rises_clearly(tmp_path, changes):
    settings = {
        "max_steps": 30,
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "beta": 0.0,
        "generation_kwargs": {"min_new_tokens": 6},
    }
    trainer, model = make(tmp_path, **{**settings, **changes})
    before = snapshot(model)
    start = trainer.evaluate()["eval_reward"]
    trainer.train()
    end = trainer.evaluate()["eval_reward"]
    # Measured .52 -> .77 (grpo); the group noise of an evaluation is about .03.
    assert end > start + 0.12
    names = moved(before, model)
    assert names
    assert all(name.startswith("latent.policy.") for name in names)


def test_nothing_but_the_policy_has_gradients_or_moves(tmp_path):
    trainer, model = make(tmp_path)
    before = snapshot(model)
    trainer.train()
    assert {n.split(".")[1] for n in moved(before, model)} == {"policy"}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("latent.policy.") for name in trainable)
    assert "latent.policy.head.weight" in moved(before, model)


def test_old_logprobs_equal_recomputed_ones_before_any_update(tmp_path):
    trainer, model = make(
        tmp_path, num_iterations=2, temperature=0.8, top_k=5, top_p=0.95, loss_type="grpo"
    )
    numbers = next(iter(trainer.get_train_dataloader()))
    replay = trainer._prepare_inputs(numbers)
    distribution = trainer.args.distribution()
    with torch.no_grad():
        logits = action_logits(model.latent.policy, replay)
        scaled = distribution.scaled_logits(logits, replay.support)
        now = ops.code_logprobs(scaled, replay.codes).logprob
    difference = (now - replay.old_logprobs)[replay.keep_mask]
    # The same tower on the same states; only the batch it stands in was cut differently.
    assert difference.abs().max() < 1e-5
    assert replay.support.sum(-1).max() <= 5
    loss = trainer.compute_loss(model, replay)
    metrics = trainer.averages.flush()
    assert metrics["clip_ratio"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the initial policy
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-5
    assert loss.requires_grad


def test_row_seeds_repeat_the_rollout(tmp_path):
    trainer, model = make(tmp_path)
    numbers = next(iter(trainer.get_train_dataloader()))
    rows = [trainer.train_dataset[i] for i in numbers]
    seeds = ops.row_seeds(11, len(rows))
    first = trainer.worker.run(model, rows, seeds, columns={})
    pick = torch.tensor([5, 2])
    again = trainer.worker.run(model, [rows[5], rows[2]], seeds[pick], columns={})
    width = again.codes.shape[1]
    assert torch.equal(again.codes, first.codes[pick][:, :width])
    assert again.texts == [first.texts[5], first.texts[2]]
    other = trainer.worker.run(model, rows, ops.row_seeds(12, len(rows)), columns={})
    assert other.texts != first.texts


def test_clipping_acts_when_a_rollout_is_used_twice(tmp_path):
    once, _ = make(tmp_path, num_iterations=1, learning_rate=3e-2)
    once.train()
    assert max(logged(once, "clip_ratio")) == 0
    twice, _ = make(tmp_path, num_iterations=2, learning_rate=3e-2)
    twice.train()
    ratios = logged(twice, "clip_ratio")
    assert ratios[0] == 0  # first pass over the first rollout: on policy
    assert ratios[1] > 0
    assert len(logged(twice, "reward")) == 2  # 4 steps, 2 rollouts


def test_a_rollout_cut_into_micro_batches_covers_every_completion_once(tmp_path):
    trainer, _ = make(tmp_path, per_device_train_batch_size=4, steps_per_generation=4)
    loader = iter(trainer.get_train_dataloader())
    seeds = [trainer._prepare_inputs(next(loader)).seeds.tolist() for _ in range(4)]
    flat = [seed for part in seeds for seed in part]
    assert len(flat) == len(set(flat)) == 16
    assert sorted(flat) == sorted(trainer._replay.seeds.tolist())


def test_dr_grpo_advantages_are_centred_but_not_scaled(tmp_path):
    advantages = {}
    for name in ("grpo", "dr_grpo"):
        trainer, _ = make(tmp_path, loss_type=name)
        replay = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        order = replay.seeds.argsort()
        advantages[name] = replay.advantages[order].view(-1)
    # Same seeds, same rollout. Rewards are shares of 6 tokens, so a group's std is below 1 and
    # dividing by it makes every advantage larger.
    plain, scaled = advantages["dr_grpo"], advantages["grpo"]
    assert torch.equal(plain.sign(), scaled.sign())
    moving = plain.abs() > 1e-6
    assert moving.any()
    assert (scaled[moving].abs() > 1.2 * plain[moving].abs()).all()


def test_failed_rewards_drop_samples_and_are_counted(tmp_path):
    def judge(completion_ids, **columns):
        scores = even_tokens(completion_ids)
        scores[0] = math.nan
        scores[4:8] = [TimeoutError("no answer")] * 4  # a whole group
        return scores

    trainer, _ = make(tmp_path, judge)
    replay = trainer._new_replay(next(iter(trainer.get_train_dataloader())), 0)
    lost = [0, 4, 5, 6, 7]
    assert not replay.keep_mask[lost].any()
    assert replay.advantages[lost].eq(0).all()
    assert replay.keep_mask[1].any()
    assert replay.advantages[1:4].sum().item() == pytest.approx(0, abs=1e-4)
    metrics = trainer.averages.flush()
    assert metrics["failed_rewards"] == 5
    assert 0 <= metrics["reward"] <= 1
    trainer.train()
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))


def test_a_reward_that_always_fails_stops_the_run(tmp_path):
    def broken(**columns):
        raise KeyError("anwser")

    trainer, model = make(tmp_path, broken)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"3 rollouts in a row failed: .*KeyError: 'anwser'"):
        trainer.train()
    assert moved(before, model) == set()


def test_several_rewards_sync_async_weighted_and_logged(tmp_path):
    seen = {}

    async def judge(prompts, completions, completion_ids, answer, trainer_state, **columns):
        seen.update(prompts=prompts, completions=completions, answer=answer, state=trainer_state)
        return [None if a % 2 else 2.0 for a in answer]

    trainer, _ = make(
        tmp_path, [even_tokens, judge], reward_weights=[1.0, 0.5], max_steps=1, beta=0.01
    )
    trainer.train()
    assert seen["prompts"][0][0]["role"] == "user"
    assert seen["completions"][0][0]["role"] == "assistant"
    assert seen["state"] is trainer.state
    groups = [seen["answer"][i : i + 4] for i in range(0, 16, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    entry = trainer.state.log_history[0]
    assert entry["rewards/judge/mean"] == 2.0
    names = {
        "reward",
        "reward_std",
        "rewards/even_tokens/mean",
        "rewards/even_tokens/std",
        "frac_reward_zero_std",
        "kl",
        "entropy",
        "clip_ratio",
        "completion_length",
        "completions/mean_length",
        "completions/clipped_ratio",
        "code_perplexity",
        "codes_used",
        "rollout_seconds",
        "update_seconds",
        "failed_rewards",
    }
    assert names <= set(entry)


def test_truncated_completions_can_be_left_out(tmp_path):
    masked, _ = make(
        tmp_path, mask_truncated_completions=True, generation_kwargs={"min_new_tokens": 6}
    )
    replay = masked._prepare_inputs(next(iter(masked.get_train_dataloader())))
    assert not replay.keep_mask.any()  # none can end
    plain, _ = make(tmp_path, generation_kwargs={"min_new_tokens": 6})
    assert plain._prepare_inputs(next(iter(plain.get_train_dataloader()))).keep_mask.all()


def test_dapo_replaces_groups_without_signal(tmp_path):
    calls = []

    def flat_for_some(completion_ids, answer, **columns):
        """Prompts 0-5 give every completion the same reward, 6 and 7 do not."""
        calls.append(sorted(set(answer)))
        noise = [float(sum(ids) % 7 + index % 4) for index, ids in enumerate(completion_ids)]
        return [n if a >= 6 else 1.0 for n, a in zip(noise, answer, strict=True)]

    trainer, _ = make(
        tmp_path,
        flat_for_some,
        loss_type="dapo",
        max_resample_rounds=20,
        num_iterations=2,
        shuffle_dataset=False,
    )
    replay = trainer._new_replay([0] * 4 + [1] * 4 + [6] * 4 + [2] * 4, 0)
    assert len(replay) == 16
    assert replay.advantages.view(4, 4).abs().sum(1).gt(0).all()
    assert len(calls) > 1
    # Rounds ask only for what is missing.
    assert calls[0] == [0, 1, 2, 6]
    assert all(len(call) <= 3 for call in calls[1:])
    metrics = trainer.averages.flush()
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-4  # joined states fit the codes

    calls.clear()
    limited, _ = make(tmp_path, flat_for_some, loss_type="dapo", max_resample_rounds=2)
    replay = limited._new_replay([0] * 16, 0)
    assert len(calls) <= 3
    assert len(replay) == 16


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2}
    whole, whole_model = make(tmp_path / "whole", **saving)
    whole.train()
    cut, _ = make(tmp_path / "cut", callbacks=[StopAt(3)], **saving)
    cut.train()
    resumed, model = make(tmp_path / "cut", **saving)
    # Another policy than the run began with: the reference must come from the checkpoint.
    with torch.no_grad():
        resumed.reference.head.weight.add_(1.0)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert moved(snapshot(whole_model), model) == set()
    assert resumed.micro_step == whole.micro_step == 6


def test_evaluation_is_repeatable_and_leaves_the_run_alone(tmp_path):
    trainer, model = make(tmp_path, num_generations_eval=2)
    before = snapshot(model)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reward"] == second["eval_reward"]
    assert "eval_rewards/even_tokens/mean" in first
    assert moved(before, model) == set()
    assert trainer.micro_step == 0


def test_replay_can_be_kept_in_another_dtype(tmp_path):
    trainer, _ = make(tmp_path, replay_dtype="bfloat16", max_steps=1)
    trainer.train()
    assert {g.hidden.dtype for g in trainer._replay.states.groups} == {torch.bfloat16}


def test_errors(tmp_path):
    model, processor = tiny_model()
    with pytest.raises(ValueError, match="processing_class is None and no processor was found"):
        LatentGRPOTrainer(model, even_tokens, config(tmp_path), prompts(8))
    with pytest.raises(ValueError, match=r"reward_weights must have one entry .*\(1\), got 2"):
        LatentGRPOTrainer(
            model,
            even_tokens,
            config(tmp_path, reward_weights=[1.0, 2.0]),
            prompts(8),
            processing_class=processor,
        )
    small = LatentGRPOTrainer(
        model, even_tokens, config(tmp_path), prompts(3), processing_class=processor
    )
    with pytest.raises(ValueError, match="a rollout needs 4 prompts, the dataset has 3"):
        small.train()


def test_the_decoder_rolls_out_what_generate_does(tmp_path):
    rollouts = []
    for use_decoder in (True, False):
        trainer, model = make(tmp_path / str(use_decoder), use_decoder=use_decoder)
        rows = [row for row in prompts(3) for _ in range(4)]
        seeds = ops.row_seeds(5, 12)
        rollouts.append(trainer.worker.run(model, rows, seeds, columns={}))
    engine, plain = rollouts
    assert torch.equal(engine.codes, plain.codes)
    assert torch.equal(engine.completion_mask, plain.completion_mask)
    assert engine.texts == plain.texts
    assert torch.equal(engine.terminated, plain.terminated)
    torch.testing.assert_close(engine.logprobs, plain.logprobs, rtol=0, atol=1e-5)
    assert len(engine.groups) == 3
    for ours, theirs in zip(engine.groups, plain.groups, strict=True):
        assert ours.lengths == theirs.lengths
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=0, atol=1e-5)


def test_a_prompt_s_rows_share_one_prefill(tmp_path):
    trainer, model = make(tmp_path, decoder_slots=3)
    lengths = []
    handle = model.decoder.register_forward_hook(
        lambda module, args, kwargs, out: lengths.append(out.last_hidden_state.shape[:2]),
        with_kwargs=True,
    )
    rows = [row for row in prompts(2) for _ in range(4)]
    trainer.worker.run(model, rows, ops.row_seeds(1, 8), columns={})
    handle.remove()
    assert sum(batch for batch, length in lengths if length > 1) == 2
    assert max(batch for batch, length in lengths if length == 1) == 3


def test_a_compiled_decoder_is_asked_for_by_name(tmp_path, monkeypatch):
    compiled = []
    # Compiling itself is tested with the decoder; here it is enough that it is asked for.
    monkeypatch.setattr(torch, "compile", lambda step, **options: compiled.append(options) or step)
    trainer, model = make(tmp_path, decoder_compile=True)
    rows = [row for row in prompts(1) for _ in range(4)]
    trainer.worker.run(model, rows, ops.row_seeds(5, 4), columns={})
    assert compiled
