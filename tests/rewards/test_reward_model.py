"""Reward models: TRL's numbers, batches, names, images."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from latent_rl.rewards import RewardModel, resolve_rewards, score_all, score_rows
from tests.tiny_models import tiny_image, tiny_vlm

PROMPTS = [
    [{"role": "user", "content": "How many birds are there ?"}],
    [{"role": "user", "content": "What is in the picture ? A red house . A blue boat ."}],
    [{"role": "user", "content": "one"}],
]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("two", "a red house", "")]


def tokenizer() -> Any:
    processor = tiny_vlm("qwen2_5_vl").processor
    tokens = copy.deepcopy(processor.tokenizer)
    tokens.chat_template = processor.chat_template
    return tokens


def classifier(labels: int = 1) -> Any:
    tokens = tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=labels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForSequenceClassification(config)


def call(reward: Any, prompts: Any = PROMPTS, completions: Any = COMPLETIONS, **more: Any) -> Any:
    return reward(
        prompts=prompts, completions=completions, completion_ids=[[]] * len(prompts), **more
    )


def trl_rewards(model: Any, tokens: Any, prompts: Any, completions: Any) -> list[float]:
    """What `trl.GRPOTrainer._calculate_rewards` computes for the same model."""
    trl = pytest.importorskip("trl", reason="TRL's trainer is the oracle of this test")

    class Host(trl.GRPOTrainer):
        def __init__(self) -> None:
            self.accelerator = types.SimpleNamespace(
                device=torch.device("cpu"), num_processes=1, is_main_process=False
            )
            self.args = types.SimpleNamespace(report_to=[], device="cpu", past_index=-1)
            self.reward_funcs, self.reward_func_names = [model], ["model"]
            self.reward_processing_classes = [tokens]
            self.chat_template_kwargs: dict[str, Any] = {}
            self.state, self.environments = types.SimpleNamespace(global_step=0), None
            self._has_async_funcs = False
            self._log_completion_extra = self._log_metric = None

    host = Host()
    rows = [{"prompt": prompt} for prompt in prompts]
    host.is_deepspeed_enabled = False
    table = host._calculate_rewards(rows, prompts, completions, [[1]] * len(prompts))
    return table[:, 0].tolist()


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_the_numbers_are_trl_s(chat: bool) -> None:
    tokens, model = tokenizer(), classifier()
    prompts: Any = PROMPTS if chat else ["one two", "red", "How many birds are there ?"]
    completions: Any = COMPLETIONS if chat else [" three", " house . A green tree", ""]
    ours = call(RewardModel(model, tokens), prompts, completions)
    theirs = trl_rewards(model, tokens, prompts, completions)
    # The same forward of the same batch.
    assert ours == theirs
    assert len(set(ours)) == 3


def test_batches_change_nothing_and_nothing_is_trained() -> None:
    model = classifier().train()
    whole = call(RewardModel(model, tokenizer()))
    parts = call(RewardModel(model, tokenizer(), batch_size=2))
    # Another batch pads to another length; float32 rounding is all that may differ.
    assert parts == pytest.approx(whole, abs=1e-5)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_name_loads_model_and_tokenizer(tmp_path: Path) -> None:
    directory = tmp_path / "charm-reward"
    classifier().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    functions = resolve_rewards(str(directory), device="cpu")
    table = score_all(
        functions,
        prompts=PROMPTS,
        completions=COMPLETIONS,
        completion_ids=[[]] * 3,
        columns={},
    )
    assert table.names == ("charm-reward",)
    assert table.rewards == pytest.approx(call(RewardModel(classifier(), tokenizer())), abs=1e-6)


def test_models_and_functions_mix_with_their_processing_classes() -> None:
    def other(**columns: Any) -> list[float]:
        return [1.0] * 3

    given = [other, classifier()]
    functions = resolve_rewards(given, [None, tokenizer()])
    assert functions[0] is other
    assert isinstance(functions[1], RewardModel)
    assert isinstance(given[1], nn.Module)  # the list given is left as it was
    with pytest.raises(ValueError, match=r"one entry per reward function \(2\), got 1"):
        resolve_rewards(given, tokenizer())
    with pytest.raises(ValueError, match="at least one reward function"):
        resolve_rewards([])
    with pytest.raises(ValueError, match="num_labels=1, got 3"):
        RewardModel(classifier(3), tokenizer())


def test_parts_of_content_reach_a_text_model_as_text() -> None:
    parts = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "one"}]}]]
    plain = [[{"role": "user", "content": "one"}]]
    reward = RewardModel(classifier(), tokenizer())
    assert call(reward, parts, COMPLETIONS[:1]) == call(reward, plain, COMPLETIONS[:1])


class SeesImages(nn.Module):
    """A reward model over an image-text model: the mean of its last logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.seen: list[bool] = []

    def forward(self, **inputs: Any) -> Any:
        self.seen.append("pixel_values" in inputs)
        logits = self.model(**inputs).logits[:, -1:].mean(-1)
        return types.SimpleNamespace(logits=logits)


def test_an_image_text_model_reads_the_rows_images() -> None:
    vlm = tiny_vlm("qwen2_5_vl")
    reward = RewardModel(SeesImages(vlm.model), vlm.processor, name="sees")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What ?"}]}]
    call_one = {"prompts": [prompt], "completions": COMPLETIONS[:1]}
    one = call(reward, **call_one, images=[[tiny_image(1)]])
    other = call(reward, **call_one, images=[[tiny_image(2)]])
    assert reward.model.seen == [True, True]
    assert one != other
    assert call(reward, **call_one, image=[tiny_image(1)]) == one


def test_rewards_get_images_and_not_their_paths(tmp_path: Path) -> None:
    tiny_image(3).save(tmp_path / "a.png")
    seen: dict[str, Any] = {}

    def looks(images: Any, **columns: Any) -> list[float]:
        seen["images"] = images
        return [0.0] * len(images)

    row = {"prompt": "?", "images": [str(tmp_path / "a.png")]}
    bare = {"prompt": "?", "images": []}
    score_rows([looks], [row, row, bare], ["x"] * 3, [[]] * 3)
    first, second, third = seen["images"]
    assert first[0].size == tiny_image(3).size
    assert first[0] is second[0]  # decoded once for the completions of a prompt
    assert third == []
    with pytest.raises(FileNotFoundError, match="no such file"):
        score_rows([looks], [{"prompt": "?", "images": ["gone.png"]}], ["x"], [[]])
