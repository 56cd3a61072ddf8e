"""Checkpoints: reload to identical outputs, or one clear error and nothing half-done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_rl.models import LatentActionModel, LatentConfig, checkpoint, load_into
from tests.models.conftest import Case, build
from tests.tiny_models import ARCHITECTURES, tiny_vlm

FILES = {checkpoint.WEIGHTS_NAME, checkpoint.CONFIG_NAME}


def outputs(model: LatentActionModel, case: Case) -> list[torch.Tensor]:
    trace = model.encode(case.inputs)
    state = model.state(trace)
    said = model.generate(case.inputs, max_new_tokens=6, seed=3)
    head = model.inverse(state, trace).head
    return [
        head,
        model.inverse_codes(head),
        model.policy_logits(state, trace),
        model(case.inputs).logits,
        said.sequences,
        said.codes,
    ]


def same(first: LatentActionModel, second: LatentActionModel, case: Case) -> bool:
    pairs = zip(outputs(first, case), outputs(second, case), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reloads_to_identical_outputs(name: str, tmp_path: Path) -> None:
    case = build(name)
    trace = case.model.encode(case.inputs)
    case.model.train()
    inverse = case.model.inverse(case.model.state(trace), trace)
    case.model.quantize(inverse.head, inverse.valid)  # k-means: a codebook that was learned
    case.model.eval()
    case.model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    again = LatentActionModel.from_pretrained(tmp_path, tiny_vlm(name).model)
    assert again.latent_config == case.model.latent_config
    assert bool(again.latent.quantizer.codebook.initialised)
    assert same(case.model, again, case)


@pytest.mark.parametrize(
    "config",
    [
        {"quantizer": "gumbel", "merge_form": "block", "code_dim": 24},
        {"vq_decay": None, "merge_form": "norm_delta", "projector": False},
        {"metric": "cosine", "merge_blocks": 1, "merge_intermediate": 10, "dtype": "bfloat16"},
    ],
)
def test_every_form_reloads(config: dict[str, Any], tmp_path: Path) -> None:
    case = build("qwen2_5_vl", **config)
    case.model.save_pretrained(tmp_path)
    again = LatentActionModel.from_pretrained(tmp_path, tiny_vlm("qwen2_5_vl").model)
    assert same(case.model, again, case)


def test_latent_modules_alone_unless_asked(qwen: Case, tmp_path: Path) -> None:
    qwen.model.save_pretrained(tmp_path)
    names = load_file(tmp_path / checkpoint.WEIGHTS_NAME)
    assert set(names) == set(qwen.model.latent.state_dict())


def test_tuned_backbone_travels_with_the_checkpoint(qwen: Case, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in qwen.model.decoder.layers[-1].parameters():
            parameter.add_(0.05)
    qwen.model.save_pretrained(tmp_path, include_backbone=True)
    qwen.model.save_pretrained(tmp_path, include_backbone=True)  # replaces its own
    again = LatentActionModel.from_pretrained(tmp_path)
    assert same(qwen.model, again, qwen)
    untuned = LatentActionModel.from_pretrained(tmp_path, tiny_vlm("qwen2_5_vl").model)
    assert not same(qwen.model, untuned, qwen)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "backbone"}


def test_the_named_base_model_is_loaded(qwen: Case, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    qwen.model.backbone.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    model = LatentActionModel(base, qwen.model.latent_config)
    model.latent.load_state_dict(qwen.model.latent.state_dict())
    model.save_pretrained(tmp_path / "latent")
    assert same(LatentActionModel.from_pretrained(tmp_path / "latent"), qwen.model, qwen)


def test_without_a_name_a_backbone_is_asked_for(qwen: Case, tmp_path: Path) -> None:
    qwen.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no base model"):
        LatentActionModel.from_pretrained(tmp_path)


def test_other_files_are_left_alone(qwen: Case, tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    qwen.model.save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.pt").read_bytes() == b"state"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(bytes(data))


def no_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["policy.head.weight"]
    rewrite(path, tensors)


def add_a_tensor(path: Path) -> None:
    rewrite(path, {**load_file(path), "policy.extra": torch.zeros(1)})


def other_shape(path: Path) -> None:
    rewrite(path, {**load_file(path), "policy.head.weight": torch.zeros(3, 64)})


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A well-formed file of other tensors, as an older library might have written."""
    record = (path.parent / checkpoint.CONFIG_NAME).read_text()
    metadata = {"format": "pt", "record": record, "sha256": checkpoint._digest(tensors)}
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is corrupt"),
        (flip_a_bit, "tensors differ from their digest"),
        (no_header, "is corrupt"),
        (drop_a_tensor, r"1 missing \['policy.head.weight'\]"),
        (add_a_tensor, r"1 unexpected \['policy.extra'\]"),
        (other_shape, r"policy.head.weight must be \[16, 64\], got \[3, 64\]"),
    ],
)
def test_damaged_weights_are_refused_and_nothing_is_loaded(
    qwen: Case, tmp_path: Path, damage: Any, message: str
) -> None:
    qwen.model.save_pretrained(tmp_path)
    damage(tmp_path / checkpoint.WEIGHTS_NAME)
    with pytest.raises(ValueError, match=message):
        LatentActionModel.from_pretrained(tmp_path, tiny_vlm("qwen2_5_vl").model)
    before = {k: v.clone() for k, v in qwen.model.latent.state_dict().items()}
    with torch.no_grad():
        qwen.model.latent.policy.head.weight.add_(1)
    before["policy.head.weight"] = qwen.model.latent.policy.head.weight.clone()
    with pytest.raises(ValueError, match=message):
        load_into(qwen.model, tmp_path)
    for name, value in qwen.model.latent.state_dict().items():
        assert torch.equal(value, before[name]), name


def edit(path: Path, change: Any) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["latent"].update(num_codes=8), "num_codes 8, but .* saved with 16"),
        (lambda r: r["latent"].update(colour=1), "unknown field"),
        (lambda r: r["latent"].update(num_codes=0), "num_codes must be >= 1, got 0"),
        (lambda r: r.update(format_version=99), "format version 99"),
        (lambda r: r.pop("latent"), "is corrupt"),
        (lambda r: r["base_model"].update(hidden_size=48), "hidden_size 48, got 64"),
    ],
)
def test_wrong_settings_are_refused(qwen: Case, tmp_path: Path, change: Any, message: str) -> None:
    qwen.model.save_pretrained(tmp_path)
    edit(tmp_path / checkpoint.CONFIG_NAME, change)
    with pytest.raises(ValueError, match=message):
        LatentActionModel.from_pretrained(tmp_path, tiny_vlm("qwen2_5_vl").model)


def test_another_k_or_backbone_is_refused(qwen: Case, tmp_path: Path) -> None:
    qwen.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has num_codes 16, the model has 8"):
        load_into(build("qwen2_5_vl", num_codes=8).model, tmp_path)
    with pytest.raises(ValueError, match="model_type 'qwen2_5_vl', got 'llava'"):
        LatentActionModel.from_pretrained(tmp_path, tiny_vlm("llava").model)


def test_missing_files(qwen: Case, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=checkpoint.CONFIG_NAME):
        LatentActionModel.from_pretrained(tmp_path, qwen.model.backbone)
    qwen.model.save_pretrained(tmp_path)
    (tmp_path / checkpoint.WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=checkpoint.WEIGHTS_NAME):
        LatentActionModel.from_pretrained(tmp_path, tiny_vlm("qwen2_5_vl").model)


@pytest.mark.parametrize("include_backbone", [False, True])
def test_an_interrupted_save_keeps_the_old_checkpoint(
    qwen: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, include_backbone: bool
) -> None:
    qwen.model.save_pretrained(tmp_path, include_backbone=include_backbone)
    expected = outputs(qwen.model, qwen)
    with torch.no_grad():
        for parameter in qwen.model.latent.parameters():
            parameter.add_(0.1)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        qwen.model.save_pretrained(tmp_path, include_backbone=include_backbone)
    extra = {"backbone"} if include_backbone else set()
    assert {path.name for path in tmp_path.iterdir()} == FILES | extra
    again = LatentActionModel.from_pretrained(tmp_path, tiny_vlm("qwen2_5_vl").model)
    for a, b in zip(outputs(again, qwen), expected, strict=True):
        assert torch.equal(a, b)


def test_gathered_state_is_written_as_given(qwen: Case, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in qwen.model.state_dict().items()}
    state["latent.policy.head.weight"].fill_(0.5)
    qwen.model.save_pretrained(tmp_path, state_dict=state)
    load_into(qwen.model, tmp_path)
    assert (qwen.model.latent.policy.head.weight == 0.5).all()


def test_settings_alone_can_be_read(qwen: Case, tmp_path: Path) -> None:
    qwen.model.save_pretrained(tmp_path)
    config, record = checkpoint.read_config(tmp_path)
    assert config == qwen.model.latent_config
    assert record["base_model"]["model_type"] == "qwen2_5_vl"
    assert LatentConfig.from_mapping(json.loads(config.to_json())) == config
