"""The token-level arm: TRL's trainer on the latent run's prompts, rewards and budget."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from latent_rl.data import render_prompts
from latent_rl.train import (
    ALGORITHMS,
    TOKEN_ALGORITHMS,
    ArmJob,
    LatentArm,
    LatentGRPOConfig,
    LatentGRPOTrainer,
    TokenArm,
    run_arm,
    token_arguments,
    token_trainer,
)
from tests.tiny_models import tiny_image
from tests.train.tiny_world import prompts, tiny_model

pytest.importorskip("trl", reason="the token-level baseline is TRL's trainer")


def rows(count: int = 4) -> list[dict]:
    """RL rows that all have an image, a different one each."""
    return [{**row, "images": [tiny_image(i)]} for i, row in enumerate(prompts(count))]


def config(path: Path, **changes) -> LatentGRPOConfig:
    settings = {
        "output_dir": str(path),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    return LatentGRPOConfig(**{**settings, **changes})


class Recorder:
    """A reward (share of even token ids) that notes what it was called with."""

    __name__ = "even"

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, *, prompts, completions, completion_ids, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, **columns})
        return [sum(t % 2 == 0 for t in ids) / max(1, len(ids)) for ids in completion_ids]


def both_arms(path: Path, data: list[dict], **changes) -> dict[str, tuple]:
    """(run, reward) by arm, from the same initial weights."""
    found = {}
    for name in ("latent", "token"):
        model, processor = tiny_model(act=0.3)
        reward = Recorder()
        arm = {
            "latent": LatentArm(lambda model=model: model),
            "token": TokenArm(lambda model=model: model.backbone),
        }[name]
        args = config(path / name, **changes)
        found[name] = run_arm(arm, ArmJob([reward], data, processor), args, quiet=True), reward
    return found


class TestTheSameWork:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {
                "num_iterations": 2,
                "steps_per_generation": 2,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_steps": 5,
            },
        ],
        ids=["one-update-per-rollout", "a-rollout-serves-two-steps"],
    )
    def test_prompts_rewards_completions_and_steps(self, tmp_path, changes):
        found = both_arms(tmp_path, rows(), **changes)
        (latent, ours), (token, theirs) = found["latent"], found["token"]
        # Three rollouts of two prompts out of four: the second epoch's order is in it.
        assert [call["answer"] for call in ours.calls] == [call["answer"] for call in theirs.calls]
        assert len(ours.calls) == 3
        assert len({tuple(call["answer"]) for call in ours.calls}) > 1
        for mine, other in zip(ours.calls, theirs.calls, strict=True):
            assert mine.keys() == other.keys()
            assert mine["prompts"] == other["prompts"]
            assert mine["images"] == other["images"]  # the very same pictures
            form = [[(m["role"], type(m["content"])) for m in c] for c in mine["completions"]]
            assert form == [[("assistant", str)]] * 8
            assert form == [
                [(m["role"], type(m["content"])) for m in c] for c in other["completions"]
            ]
        for run in (latent, token):
            assert run.spending.completions == 24
            assert run.spending.optimizer_steps == changes.get("max_steps", 3)
            assert 24 <= run.spending.generated_tokens <= 24 * 5
            assert run.spending.rollout_seconds > 0
            assert run.spending.update_seconds > 0
        assert latent.learning_rate == token.learning_rate == 1e-3

    def test_both_logs_have_the_same_accounts(self, tmp_path):
        found = both_arms(tmp_path, rows(), max_steps=1)
        names = [
            {name for name in run.history[0] if name.startswith("spent/")}
            for run, _ in found.values()
        ]
        assert names[0] == names[1] != set()
        for run, _ in found.values():
            entry = run.history[0]
            assert {"reward", "reward_std", "rollout_seconds", "update_seconds"} <= set(entry)
            assert entry["rollout_seconds"] == pytest.approx(entry["spent/rollout_seconds"])

    def test_prompts_are_rendered_alike(self, tmp_path):
        model, processor = tiny_model()
        data = rows(2)
        trainer = token_trainer(model.backbone, Recorder(), config(tmp_path), data, None, processor)
        trainer.model.train()
        inputs = [{"row": number} for number in (0, 0, 0, 0, 1, 1, 1, 1)]
        seen = trainer._generate_and_score_completions(inputs)
        expected = render_prompts(processor, [data[item["row"]] for item in inputs])
        assert torch.equal(seen["prompt_ids"], expected["input_ids"])
        assert torch.equal(seen["prompt_mask"], expected["attention_mask"])
        assert torch.equal(seen["pixel_values"], expected["pixel_values"])

    def test_a_failed_reward_drops_the_sample_in_both_arms(self, tmp_path):
        def fails_for_one(*, completion_ids, **columns):
            return [float("nan") if i == 0 else float(i) for i in range(len(completion_ids))]

        model, processor = tiny_model(act=0.3)
        token = token_trainer(
            model.backbone, fails_for_one, config(tmp_path), rows(), None, processor
        )
        token.model.train()
        inputs = [{"row": number} for number in (0, 0, 0, 0, 1, 1, 1, 1)]
        theirs = token._generate_and_score_completions(inputs)["advantages"]
        token.log({"loss": 0.0})
        assert token.state.log_history[-1]["failed_rewards"] == 1
        latent = LatentGRPOTrainer(model, fails_for_one, config(tmp_path), rows(), None, processor)
        ours = latent._new_replay([0, 0, 0, 0, 1, 1, 1, 1], 0).advantages
        assert float(theirs[0]) == 0
        assert torch.allclose(ours, theirs, atol=1e-5)

    def test_a_run_whose_rewards_fail_stops_in_both_arms(self, tmp_path):
        def fails(*, completion_ids, **columns):
            return [float("nan") if i % 2 else 1.0 for i in range(len(completion_ids))]

        rate = {"max_reward_failure_rate": 0.4, "reward_failure_window": 2}
        for name, make in (("latent", LatentGRPOTrainer), ("token", token_trainer)):
            model, processor = tiny_model(act=0.3)
            trained = model if name == "latent" else model.backbone
            args = config(tmp_path / name, **rate)
            trainer = make(trained, fails, args, rows(), None, processor)
            with pytest.raises(RuntimeError, match=r"max_reward_failure_rate=0\.4"):
                trainer.train()

    def test_the_reference_is_the_model_as_given(self, tmp_path):
        model, processor = tiny_model()
        backbone = model.backbone
        # What TRL would load, were it to go by the name.
        backbone.config._name_or_path = "some/model-that-is-not-there"
        with torch.no_grad():
            backbone.get_input_embeddings().weight.add_(1.0)
        trainer = token_trainer(backbone, Recorder(), config(tmp_path), rows(), None, processor)
        held = trainer.ref_model.get_input_embeddings().weight
        assert torch.equal(held, backbone.get_input_embeddings().weight)
        assert held.data_ptr() != backbone.get_input_embeddings().weight.data_ptr()

    def test_every_parameter_of_the_model_learns(self, tmp_path):
        model, processor = tiny_model()
        model.backbone.requires_grad_(False)
        token_trainer(model.backbone, Recorder(), config(tmp_path), rows(), None, processor)
        assert all(p.requires_grad for p in model.backbone.parameters())

    def test_an_interrupted_arm_goes_on(self, tmp_path):
        changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        job = ArmJob([Recorder()], rows(), tiny_model()[1])
        arm = TokenArm(lambda: tiny_model()[0].backbone)
        # With nothing to resume from, resuming begins.
        first = run_arm(arm, job, config(tmp_path, **changes), resume=True, quiet=True)
        longer = config(tmp_path, **{**changes, "max_steps": 3})
        again = run_arm(arm, job, longer, resume=True, quiet=True)
        assert len(job.reward_funcs[0].calls) == 3
        assert again.curve[:2] == first.curve[:2]
        assert again.spending.completions == 24
        assert again.spending.generated_tokens > first.spending.generated_tokens

    def test_rows_with_and_without_images_are_refused_with_the_reason(self, tmp_path):
        model, processor = tiny_model()
        trainer = token_trainer(
            model.backbone, Recorder(), config(tmp_path), prompts(4), None, processor
        )
        with pytest.raises(ValueError, match="with and without images"):
            trainer.train()


class TestSettings:
    @pytest.mark.parametrize("name", sorted(set(ALGORITHMS) & set(TOKEN_ALGORITHMS)))
    def test_shared_settings_arrive_unchanged(self, tmp_path, name):
        args = config(
            tmp_path,
            loss_type=name,
            dynamic_sampling=False,
            scale_rewards=None if name == "rloo" else "batch",
            epsilon_high=0.3,
            beta=0.02,
            seed=5,
            weight_decay=0.1,
            gradient_accumulation_steps=2,
            reward_weights=[2.0],
            generation_kwargs={"min_new_tokens": 2},
        )
        theirs = token_arguments(args)
        own = {field.name for field in dataclasses.fields(args) if field.init}
        for field in dataclasses.fields(theirs):
            resolved = {"loss_type", "scale_rewards", "epsilon", "importance_sampling_level"}
            resolved |= {"generation_batch_size"}
            if field.name in own - resolved:
                assert getattr(theirs, field.name) == getattr(args, field.name), field.name
        assert theirs.epsilon == args.clip_range().low
        assert theirs.generation_batch_size == args.rollout_size

    @pytest.mark.parametrize("name", ["grpo", "dr_grpo", "bnpo"])
    def test_an_algorithms_defaults_are_filled_in(self, tmp_path, name):
        args = config(tmp_path, loss_type=name)
        theirs = token_arguments(args)
        assert theirs.loss_type == name
        assert theirs.scale_rewards == ("none" if name == "dr_grpo" else "group")
        assert theirs.epsilon_high == args.clip_range().high

    def test_dapo_clips_higher_in_both_arms(self, tmp_path):
        theirs = token_arguments(config(tmp_path, loss_type="dapo", dynamic_sampling=False))
        assert (theirs.loss_type, theirs.epsilon, theirs.epsilon_high) == ("dapo", 0.2, 0.28)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"loss_type": "dapo"}, "dynamic_sampling"),
            ({"dynamic_sampling": True}, "dynamic_sampling"),
            ({"generation_kwargs": {"stop_strings": ["."]}}, "stop_strings"),
        ],
    )
    def test_what_trl_lacks_is_refused_by_name(self, tmp_path, changes, named):
        with pytest.raises(ValueError, match=named):
            token_arguments(config(tmp_path, **changes))

    def test_a_setting_nobody_mapped_is_refused_once_it_says_something(self, tmp_path):
        @dataclass
        class Later(LatentGRPOConfig):
            novelty: float = 0.0

        plain = {**config(tmp_path).to_dict(), "novelty": 0.0}
        kept = {f.name for f in dataclasses.fields(Later) if f.init}
        plain = {name: value for name, value in plain.items() if name in kept}
        token_arguments(Later(**plain))
        with pytest.raises(ValueError, match=r"novelty=0\.5"):
            token_arguments(Later(**{**plain, "novelty": 0.5}))

    def test_an_algorithm_trl_lacks_is_refused_with_those_it_has(self, tmp_path):
        args = config(tmp_path)
        args.loss_type = "reinforce_plus_plus"
        with pytest.raises(ValueError, match=r"reinforce_plus_plus.*bnpo, cispo, dapo"):
            token_arguments(args)

    def test_how_latent_rollouts_are_kept_says_nothing_about_tokens(self, tmp_path):
        args = config(tmp_path, replay_dtype="bfloat16", use_decoder=False, do_sample_tokens=True)
        assert token_arguments(args).num_generations == 4

    def test_without_trl_one_line_says_how_to_get_it(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "trl", None)
        with pytest.raises(ImportError, match=r"pip install 'latent-rl\[trl\]'"):
            token_arguments(config(tmp_path))
