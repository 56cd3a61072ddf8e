"""A script for trl.GRPOTrainer moves over by its imports: every name is known, honoured or refused.

What LatentGRPOTrainer does with the settings is tested where they belong; here is that none of
TRL's is dropped in silence.
"""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from datasets import Dataset, DatasetDict

from latent_rl.data import render_prompts
from latent_rl.models import LatentActionModel
from latent_rl.train import LatentGRPOConfig, LatentGRPOTrainer
from latent_rl.train.run_inputs import NOT_HERE
from latent_rl.train.trl_settings import INERT, REFUSED, TRLSettings
from tests.tiny_models import tiny_vlm
from tests.train.tiny_world import prompts, tiny_model

trl = pytest.importorskip("trl", reason="the names are compared with TRL's")

# Explained in docs/training.md, in this order.
OTHER_DEFAULTS = {
    *("loss_type", "beta", "max_completion_length"),
    *("epsilon", "importance_sampling_level", "scale_rewards"),
    *("bf16", "gradient_checkpointing", "remove_unused_columns"),
    *("pad_to_multiple_of", "log_multimodal"),
}
ONE_STEP = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}


def config(**changes) -> LatentGRPOConfig:
    return LatentGRPOConfig(output_dir="unused", use_cpu=True, report_to="none", **changes)


def constant(completions, **columns):
    return [1.0] * len(completions)


def defaults(cls) -> dict[str, object]:
    return {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(cls)
    }


def test_every_setting_of_trl_is_known_and_other_defaults_are_listed():
    theirs, ours = defaults(trl.GRPOConfig), defaults(LatentGRPOConfig)
    assert set(theirs) - set(ours) == set()
    assert {name for name in theirs if theirs[name] != ours[name]} == OTHER_DEFAULTS


def test_every_setting_without_a_counterpart_is_refused_or_explained():
    def explained(name):
        return name in REFUSED or name in INERT or (name.startswith("vllm_") and "vllm_*" in INERT)

    assert [f.name for f in dataclasses.fields(TRLSettings) if not explained(f.name)] == []


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_here_is_refused_by_name_with_the_reason(name):
    default = getattr(LatentGRPOConfig, name)
    other = {bool: lambda: not default, str: lambda: "sequential"}.get(type(default), lambda: 3)()
    with pytest.raises(ValueError, match=f"{name} must be ") as error:
        config(**{name: other})
    assert REFUSED[name] in str(error.value)
    config(**{name: default})


def test_trl_s_own_defaults_of_the_others_are_taken():
    config(pad_to_multiple_of="auto", vllm_mode="server", disable_dropout=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not supported"),
        ({"repetition_penalty": 1.2}, "repetition_penalty needs use_decoder=False"),
        ({"cache_implementation": "static"}, "cache_implementation needs use_decoder=False"),
        ({"generation_batch_size": 12}, r"multiple of .* \(8\).*got 12"),
        ({"generation_batch_size": 0}, "got 0"),
        ({"generation_batch_size": 16, "steps_per_generation": 4}, r"\(4\), got 16"),
    ],
)
def test_settings_that_cannot_be_honoured(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_generation_batch_size_is_steps_per_generation_in_completions():
    made = config(generation_batch_size=32, gradient_accumulation_steps=2)
    assert (made.steps_per_generation, made.rollout_size) == (4, 32)
    copy = dataclasses.replace(made, learning_rate=1e-3)
    assert (copy.steps_per_generation, copy.generation_batch_size) == (4, 32)


def test_the_backbone_s_generate_is_told_of_penalty_and_cache():
    made = config(
        use_decoder=False,
        repetition_penalty=1.5,
        cache_implementation="static",
        generation_kwargs={"min_new_tokens": 2},
    )
    assert made.backbone_options() == {
        "min_new_tokens": 2,
        "repetition_penalty": 1.5,
        "cache_implementation": "static",
    }
    assert config().backbone_options() == {}


def test_the_trainer_takes_trl_s_arguments_in_trl_s_order():
    theirs = list(inspect.signature(trl.GRPOTrainer.__init__).parameters)
    ours = list(inspect.signature(LatentGRPOTrainer.__init__).parameters)
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("name", sorted(NOT_HERE))
def test_arguments_that_are_not_here_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"{name} is not supported") as error:
        LatentGRPOTrainer(None, constant, config(), prompts(8), **{name: object()})
    assert NOT_HERE[name] in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "kind", "message"),
    [
        (None, ValueError, "train_dataset is required"),
        ([], ValueError, "train_dataset has no rows"),
        (["words"], TypeError, "must be mappings with a prompt, got str"),
        ([{"question": 1}], ValueError, "needs a column 'prompt'.*its columns are question"),
        ([{"prompt": []}], ValueError, "train_dataset, row 0.*non-empty list"),
        (
            DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})),
            TypeError,
            "got the splits train; choose one",
        ),
        (
            Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(),
            TypeError,
            "must have a length.*got IterableDataset",
        ),
    ],
    ids=["none", "empty", "text", "no prompt", "no message", "splits", "stream"],
)
def test_data_that_cannot_be_sampled_is_refused_at_once(dataset, kind, message):
    with pytest.raises(kind, match=message):
        LatentGRPOTrainer(None, constant, config(), dataset)


def test_evaluation_sets_by_name_are_checked_by_name():
    with pytest.raises(ValueError, match=r"eval_dataset\['hard'\] needs a column 'prompt'"):
        LatentGRPOTrainer(None, constant, config(), prompts(8), {"hard": [{"x": 1}]})


def test_models_that_are_no_latent_ones_say_what_to_do(tmp_path):
    rows, vlm = prompts(8), tiny_vlm("qwen2_5_vl")
    with pytest.raises(TypeError, match=r"got Qwen2_5_VLFor.*wrap a base model.*InverseWarmup"):
        LatentGRPOTrainer(vlm.model, constant, config(), rows)
    with pytest.raises(ValueError, match=r"is no directory of a latent.*wrap a base model"):
        LatentGRPOTrainer(tmp_path, constant, config(), rows)
    model, processor = tiny_model()
    args = config(model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="model_init_kwargs are for a model given as a directory"):
        LatentGRPOTrainer(model, constant, args, rows, processing_class=processor)
    with pytest.raises(TypeError, match=r"model's processor .*got \w*Tokenizer"):
        LatentGRPOTrainer(model, constant, config(), rows, processing_class=processor.tokenizer)
    with pytest.raises(TypeError, match=r"reward_funcs: expected functions.*got NoneType"):
        LatentGRPOTrainer(model, None, config(), rows, processing_class=processor)


def test_a_saved_model_trains_by_its_directory_alone(tmp_path, monkeypatch):
    vlm = tiny_vlm("llava")
    model = LatentActionModel(vlm.model, tiny_model()[0].latent_config)
    model.save_pretrained(tmp_path / "cloned", include_backbone=True)
    vlm.processor.save_pretrained(tmp_path / "cloned")
    args = LatentGRPOConfig(
        output_dir=str(tmp_path / "rl"),
        model_init_kwargs={"dtype": "float64"},
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=2,
        **ONE_STEP,
    )
    trainer = LatentGRPOTrainer(str(tmp_path / "cloned"), constant, args, prompts(2))
    assert str(trainer.latent_model.dtype) == "torch.float64"
    monkeypatch.chdir(tmp_path)
    loaded = LatentActionModel.from_pretrained(tmp_path / "cloned")
    trainer = LatentGRPOTrainer(loaded, constant, train_dataset=prompts(8))
    assert trainer.args.output_dir == "backbone-LatentGRPO"
    assert trainer.args.num_generations == LatentGRPOConfig.num_generations


def test_template_arguments_reach_the_template_and_a_row_s_own_win():
    processor = tiny_vlm("qwen2_5_vl").processor
    plain = processor.chat_template
    processor.chat_template = "{% if thinks %}one {% endif %}" + plain
    try:
        rows = [{"prompt": "How many ?"}, {"prompt": "A ?", "chat_template_kwargs": {"thinks": 0}}]
        with_it = render_prompts(processor, rows, template_options={"thinks": True})
        texts = processor.batch_decode(with_it["input_ids"], skip_special_tokens=True)
    finally:
        processor.chat_template = plain
    assert [text.startswith("one") for text in texts] == [True, False]


def test_a_template_of_one_s_own_excludes_template_arguments():
    model, processor = tiny_model()
    with pytest.raises(ValueError, match="chat_template_kwargs are for the default prompt_render"):
        LatentGRPOTrainer(
            model,
            constant,
            config(chat_template_kwargs={"thinks": True}),
            prompts(8),
            processing_class=processor,
            prompt_renderer=render_prompts,
        )
