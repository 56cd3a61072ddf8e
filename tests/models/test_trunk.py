"""The trunk: untouched when disabled, encoded once, its logits reproduced."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from latent_rl.models import LatentActionModel, LatentConfig
from latent_rl.models.backbone import VocabularyHead
from tests.models.conftest import NUM_CODES, Case, build
from tests.tiny_models import ARCHITECTURES, prompts, render, tiny_image, tiny_vlm


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_disabled_is_the_base_model_bit_for_bit(name: str) -> None:
    base, processor = tiny_vlm(name)
    inputs = prompts(processor)
    logits = base(**inputs).logits
    said = base.generate(**inputs, max_new_tokens=12, do_sample=False)
    case = build(name)
    assert not torch.equal(case.model(inputs).logits, logits)  # the path does something
    with case.model.disabled():
        assert torch.equal(case.model(inputs).logits, logits)
        out = case.model.generate(inputs, max_new_tokens=12)
    assert torch.equal(out.sequences, said)
    assert (out.codes == -1).all()
    # Nor does the hook show when the backbone is used on its own.
    assert torch.equal(case.model.backbone(**inputs).logits, logits)
    assert torch.equal(
        case.model.backbone.generate(**inputs, max_new_tokens=12, do_sample=False), said
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fresh_residual_model_speaks_as_its_base(name: str) -> None:
    base, processor = tiny_vlm(name)
    inputs = prompts(processor)
    logits = base(**inputs).logits
    said = base.generate(**inputs, max_new_tokens=8, do_sample=False)
    model = LatentActionModel(base, LatentConfig(num_codes=8, inverse_layers=1, policy_layers=1))
    assert torch.equal(model(inputs).logits, logits)
    length = said.shape[1] - inputs["input_ids"].shape[1]
    assert torch.equal(model.generate(inputs, max_new_tokens=length).sequences, said)


def test_lm_logits_are_the_backbones(case: Case) -> None:
    trace = case.model.encode(case.inputs)
    assert torch.equal(
        case.model.lm_logits(trace.hidden), case.model.backbone(**case.inputs).logits
    )


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 97,
    "head_dim": 16,
    "pad_token_id": 0,
}


def test_scores_are_the_logits_in_a_dtype_that_holds_them(case: Case) -> None:
    head = VocabularyHead(copy.deepcopy(case.model.backbone).to(torch.bfloat16))
    width = case.model.config.get_text_config().hidden_size
    state = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        scores, logits = head.scores(state), head(state)
    plain = head._scale == 1.0 and head._cap is None
    assert scores.dtype == (torch.bfloat16 if plain else torch.float32)
    assert logits.dtype == torch.float32
    assert torch.equal(scores.float(), logits)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
        (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.0625)),
        (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=6.0)),
    ],
    ids=["softcap", "scale", "division"],
)
def test_capped_and_scaled_logits_are_found_out(model_class: Any, config: Any) -> None:
    torch.manual_seed(0)
    model = model_class(config).eval()
    ids = torch.randint(97, (2, 7))
    hidden = model.model(input_ids=ids).last_hidden_state
    expected = model(input_ids=ids).logits
    assert not torch.allclose(model.get_output_embeddings()(hidden), expected, rtol=1e-3)
    torch.testing.assert_close(VocabularyHead(model)(hidden), expected, rtol=1e-5, atol=1e-6)
    assert "forward" not in model.model.__dict__  # the stub is gone


def test_unknown_logit_shaping_is_refused() -> None:
    class Odd(Gemma2ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.square()
            return out

    with pytest.raises(ValueError, match="changes its logits"):
        VocabularyHead(Odd(Gemma2Config(**SMALL, final_logit_softcapping=2.0)))


def test_encode_runs_without_graph_and_without_the_head(case: Case) -> None:
    calls: list[int] = []
    head = case.model.backbone.get_output_embeddings()
    handle = head.register_forward_hook(lambda *_: calls.append(1))
    trace = case.model.encode(case.inputs)
    handle.remove()
    assert not calls
    assert not trace.hidden.requires_grad
    assert trace.hidden.shape[:2] == case.inputs["input_ids"].shape
    assert torch.equal(trace.keep_mask, case.inputs["attention_mask"].bool())


def test_encode_with_grad_reaches_the_backbone(qwen: Case) -> None:
    layer = qwen.model.decoder.layers[-1].requires_grad_(True)
    qwen.model.encode(qwen.inputs, grad=True).hidden.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert not qwen.model.encode(qwen.inputs).hidden.requires_grad


def test_only_text_rows_pass_the_projector(qwen: Case) -> None:
    inputs = render(qwen.processor, ["What is it ?", "How many birds ?"], [tiny_image(), None])
    trace = qwen.model.encode(inputs)
    assert trace.text_only.tolist() == [False, True]
    state = qwen.model.state(trace)
    assert torch.equal(state[0], trace.hidden[0])
    assert torch.equal(state[1], qwen.model.latent.projector(trace.hidden)[1])
    assert not torch.allclose(state[1], trace.hidden[1])
    without = build("qwen2_5_vl", projector=False).model
    assert without.latent.projector is None
    assert torch.equal(without.state(trace), trace.hidden)


def test_traces_select_rows(case: Case) -> None:
    model = case.model
    trace = model.encode(case.inputs)
    full = model.policy_logits(model.state(trace), trace)
    second = trace.select(torch.tensor([1]))
    assert second.batch_size == 1
    rows = model.policy_logits(model.state(second), second)
    # Padding is the same in both, only the batch is smaller.
    torch.testing.assert_close(rows[0][second.keep_mask[0]], full[1][trace.keep_mask[1]])
    assert torch.equal(trace.select(torch.tensor([False, True])).hidden, second.hidden)


def test_given_codes_change_exactly_their_positions(case: Case) -> None:
    with case.model.disabled():
        plain = case.model(case.inputs).logits
    codes = torch.full(case.inputs["input_ids"].shape, -1)
    codes[1, -2] = 3
    changed = (case.model(case.inputs, codes).logits != plain).any(-1)
    assert changed.nonzero().tolist() == [[1, codes.shape[1] - 2]]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_missing_token_types_are_refused(name: str) -> None:
    case = build(name)
    types = {k: v for k, v in case.inputs.items() if not k.endswith("token_type_ids")}
    with pytest.raises(ValueError, match=r"need (mm_)?token_type_ids"):
        case.model.encode(types)
    with pytest.raises(ValueError, match=r"need (mm_)?token_type_ids"):
        case.model.generate(types, max_new_tokens=1)
    text = render(case.processor, ["How many ?"], [None])
    case.model.encode({k: v for k, v in text.items() if not k.endswith("token_type_ids")})


def test_labels_and_missing_ids_are_refused(qwen: Case) -> None:
    with pytest.raises(ValueError, match="must not have labels"):
        qwen.model.encode({**qwen.inputs, "labels": qwen.inputs["input_ids"]})
    with pytest.raises(ValueError, match="must have input_ids"):
        qwen.model.encode({"attention_mask": qwen.inputs["attention_mask"]})


def test_unsupported_backbones_are_refused() -> None:
    class Fake(nn.Module):
        config = SimpleNamespace(model_type="paligemma")
        get_decoder = generate = lambda self: None

    with pytest.raises(ValueError, match="PaliGemma is not supported"):
        LatentActionModel(Fake())
    with pytest.raises(TypeError, match="got Linear"):
        LatentActionModel(nn.Linear(2, 2))


def test_whole_path_from_inverse_to_tokens(case: Case) -> None:
    model, inputs = case.model, case.inputs
    trace = model.encode(inputs)
    state = model.state(trace)
    inverse = model.inverse(state, trace)
    batch, length = inputs["input_ids"].shape
    assert inverse.head.shape == (batch, length, model.latent.quantizer.feature_dim)
    assert not inverse.valid[:, -1].any()
    assert torch.equal(inverse.valid[:, :-1], trace.keep_mask[:, :-1])
    model.train()
    quantized = model.quantize(inverse.head, inverse.valid)
    assert ((quantized.codes >= 0) == inverse.valid).all()
    merged = model.merge(state, quantized.codes, code_vectors=quantized.vectors)
    assert merged.isfinite().all()
    ids = inputs["input_ids"][:, 1:]
    logits = model.lm_logits(merged)[:, :-1]
    loss = nn.functional.cross_entropy(logits[trace.keep_mask[:, 1:]], ids[trace.keep_mask[:, 1:]])
    (loss + quantized.loss).backward()
    for module in (model.latent.inverse, model.latent.merge):
        grads = [p.grad for p in module.parameters()]
        assert all(g is not None and g.isfinite().all() for g in grads)
        assert all(g.any() for g in grads if g is not None)
    assert all(p.grad is None for p in model.backbone.parameters())


def test_quantize_learns_from_the_masked_rows_alone(qwen: Case) -> None:
    model = qwen.model.train()
    other = copy.deepcopy(model)
    head = torch.randn(2, 9, model.latent.quantizer.feature_dim)
    mask = torch.rand(2, 9) > 0.4
    polluted = head.masked_fill(~mask[..., None], 1e3)
    first, second = model.quantize(head, mask), other.quantize(polluted, mask)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(
        model.latent.quantizer.codebook.weight, other.latent.quantizer.codebook.weight
    )
    assert (first.codes[~mask] == -1).all()
    assert not first.vectors[~mask].any()
    assert first.mean_probs.sum().item() == pytest.approx(1.0)
    assert first.mean_probs.shape == (NUM_CODES,)


def test_merge_keeps_its_codes_for_the_backward_pass(qwen: Case) -> None:
    model = qwen.model.train()
    head = torch.randn(20, model.latent.quantizer.feature_dim, requires_grad=True)
    state = torch.randn(20, qwen.model.decoder.config.hidden_size)
    quantized = model.quantize(head)
    merged = model.merge(state, quantized.codes, code_vectors=quantized.vectors)
    model.quantize(head.detach())  # the moving average changes the codes in place
    merged.sum().backward()
    assert head.grad is not None
    assert head.grad.any()
