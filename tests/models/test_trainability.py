"""What a trainer does to a model: modes, checkpointing, copies, adapters, dtypes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latent_rl.models import LatentActionModel, LatentConfig
from tests.models.conftest import Case, build
from tests.tiny_models import prompts, tiny_vlm


def test_train_leaves_a_frozen_backbone_in_eval_mode(qwen: Case) -> None:
    model = qwen.model
    assert not model.training
    model.train()
    assert model.latent.policy.tower.training
    assert not any(module.training for module in model.backbone.modules())
    model.decoder.layers[-1].requires_grad_(True)
    model.train()
    assert model.decoder.layers[-1].training
    model.eval()
    assert not any(module.training for module in model.modules())


def test_backbone_is_frozen_and_latent_is_not(qwen: Case) -> None:
    assert not any(p.requires_grad for p in qwen.model.backbone.parameters())
    assert all(p.requires_grad for p in qwen.model.latent.parameters())


def test_what_a_trainer_looks_at(qwen: Case) -> None:
    model, backbone = qwen.model, qwen.model.backbone
    assert model.config is backbone.config
    assert model.generation_config is backbone.generation_config
    assert model.device == backbone.device
    assert model.dtype == torch.float32
    assert model.main_input_name == "input_ids"


def policy_grads(model: LatentActionModel, case: Case) -> list[torch.Tensor]:
    model.zero_grad()
    trace = model.encode(case.inputs)
    state = model.state(trace)
    loss = model.policy_logits(state, trace).square().mean()
    (loss + model.inverse(state, trace).head.square().mean()).backward()
    towers = (model.latent.policy, model.latent.inverse)
    return [p.grad.clone() for tower in towers for p in tower.parameters() if p.grad is not None]


def test_activation_checkpointing_changes_no_gradient(case: Case) -> None:
    model = case.model.train()
    plain = policy_grads(model, case)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.is_activation_checkpointing
    assert not case.model.backbone.is_gradient_checkpointing  # frozen: nothing to recompute
    again = policy_grads(model, case)
    assert plain
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


def test_the_older_names_of_checkpointing(qwen: Case) -> None:
    qwen.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert qwen.model.is_gradient_checkpointing
    qwen.model.gradient_checkpointing_disable()
    assert not qwen.model.is_gradient_checkpointing


def test_a_deep_copy_stands_alone(qwen: Case) -> None:
    twin = copy.deepcopy(qwen.model)
    expected = qwen.model(qwen.inputs).logits
    with torch.no_grad():
        for parameter in twin.latent.parameters():
            parameter.zero_()
    assert torch.equal(qwen.model(qwen.inputs).logits, expected)
    assert not torch.equal(twin(qwen.inputs).logits, expected)
    with qwen.model.disabled():
        assert twin.is_active


def test_bfloat16_backbone_keeps_float32_latents() -> None:
    backbone, processor = tiny_vlm("qwen2_5_vl")
    backbone.to(torch.bfloat16)
    inputs = prompts(processor)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    model = LatentActionModel(backbone, LatentConfig(num_codes=8, policy_layers=2))
    assert {p.dtype for p in model.latent.parameters()} == {torch.float32}
    trace = model.encode(inputs)
    assert trace.hidden.dtype == torch.bfloat16
    assert model.policy_logits(model.state(trace), trace).dtype == torch.float32
    logits = model.lm_logits(model.merge(model.state(trace), torch.zeros(2, 34, dtype=torch.long)))
    assert logits.dtype == torch.float32
    # A fresh merge is the identity, and casting float32 states back loses nothing.
    assert torch.equal(logits, backbone(**inputs).logits.float())
    out = model.generate(inputs, max_new_tokens=4)
    assert out.logprobs.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "backbone"])
def test_latent_dtype_is_a_setting(dtype: str) -> None:
    backbone = tiny_vlm("qwen2_5_vl").model.to(torch.bfloat16)
    model = LatentActionModel(backbone, LatentConfig(num_codes=8, dtype=dtype))
    assert {p.dtype for p in model.latent.parameters()} == {torch.bfloat16}
    assert model.latent.quantizer.codebook.weight.dtype == torch.float32


def test_autocast_training_step(qwen: Case) -> None:
    model = qwen.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        trace = model.encode(qwen.inputs)
        state = model.state(trace)
        inverse = model.inverse(state, trace)
        quantized = model.quantize(inverse.head, inverse.valid)
        merged = model.merge(state, quantized.codes, code_vectors=quantized.vectors)
        loss = model.lm_logits(merged)[inverse.valid].logsumexp(-1).mean() + quantized.loss
    loss.backward()
    for name, parameter in model.latent.inverse.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_lora_backbone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    backbone, processor = tiny_vlm("qwen2_5_vl")
    inputs = prompts(processor)
    plain = build("qwen2_5_vl")
    expected = plain.model.encode(inputs).hidden
    settings = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    wrapped: Any = peft.get_peft_model(backbone, settings)
    model = LatentActionModel(wrapped, plain.model.latent_config)
    torch.testing.assert_close(model.encode(inputs).hidden, expected)
    adapters = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    for adapter in adapters:
        nn.init.normal_(adapter.requires_grad_(True), std=0.5)
    trace = model.encode(inputs, grad=True)
    assert not torch.allclose(trace.hidden, expected)
    model.policy_logits(model.state(trace), trace).sum().backward()
    assert adapters
    assert all(p.grad is not None for p in adapters)
    assert model.generate(inputs, max_new_tokens=3).codes.shape[1] <= 3
    model.save_pretrained(tmp_path, include_backbone=True)
    assert (tmp_path / "backbone" / "adapter_config.json").exists()
