"""FeatureCache: cached batches give what encoding them gives."""

from __future__ import annotations

import pytest
import torch

from latent_rl.train import (
    BehaviourCloning,
    FeatureCache,
    InverseWarmup,
    Joint,
    ProjectorWarmup,
    build_feature_cache,
    collate_features,
    trace_of,
)
from tests.train.tiny_world import tiny_world


@pytest.fixture(scope="module")
def world():
    return tiny_world(act=0.1)


@pytest.fixture(scope="module")
def cache(world):
    return build_feature_cache(world.model, world.rows, world.collator, batch_size=5)


@pytest.mark.parametrize(
    "stage", [InverseWarmup(), ProjectorWarmup(), Joint(), BehaviourCloning()], ids=lambda s: s.name
)
def test_stages_see_the_same_through_the_cache(world, cache, stage):
    model = world.model.eval()
    # Row 15 was encoded in a batch of text alone, where this decoder gets no position ids.
    assert cache[15].position_ids is None
    picked = [3, 0, 6, 15, 7]
    with torch.no_grad():
        direct = stage.loss(model, world.collator([world.rows[i] for i in picked]))
        cached = stage.loss(model, collate_features([cache[i] for i in picked]))
    # Padding differs, so attention sums run in another order.
    torch.testing.assert_close(cached.loss, direct.loss, rtol=1e-4, atol=1e-4)
    for name, value in direct.metrics.items():
        torch.testing.assert_close(cached.metrics[name], value, rtol=1e-4, atol=1e-4)


def left_padded(collator):
    """The collator with every row's padding moved to the left."""

    def collate(rows):
        batch = collator(rows)
        mask = batch["inputs"]["attention_mask"]
        pads = (mask == 0).sum(1)

        def shifted(values):
            rolled = [torch.roll(v, int(n)) for v, n in zip(values, pads, strict=True)]
            return torch.stack(rolled)

        inputs = {
            name: shifted(value) if value.shape == mask.shape else value
            for name, value in batch["inputs"].items()
        }
        view = batch["text_view"]
        places = view["image_positions"] + pads[view["rows"]][:, None]
        return {
            "inputs": inputs,
            "labels": shifted(batch["labels"]),
            "text_view": {**view, "image_positions": places},
        }

    return collate


@pytest.mark.parametrize("padding", [lambda collator: collator, left_padded], ids=["right", "left"])
@torch.no_grad()
def test_towers_read_the_same_through_the_cache(world, padding):
    """Closer than losses can tell: states, their order and their rotary positions all fit."""
    model = world.model.eval()
    cached = build_feature_cache(model, world.rows, padding(world.collator), batch_size=5)
    picked = [3, 0, 6, 15, 7]
    direct = world.collator([world.rows[i] for i in picked])
    batch = collate_features([cached[i] for i in picked])
    traces = (model.encode(direct["inputs"]), trace_of(model, batch))
    outputs = [model.inverse(model.state(trace), trace) for trace in traces]
    heads = [output.head[output.valid] for output in outputs]
    # Plain counting in the place of image positions moves these by .03.
    torch.testing.assert_close(heads[1], heads[0], rtol=1e-4, atol=2e-4)
    assert torch.equal(batch["labels"], direct["labels"])
    for stage in (ProjectorWarmup(), InverseWarmup()):
        torch.testing.assert_close(
            stage.loss(model, batch).loss, stage.loss(model, direct).loss, rtol=1e-4, atol=1e-4
        )


def test_rows_hold_real_tokens_alone(world, cache):
    for index, row in enumerate(cache.rows):
        batch = world.collator([world.rows[index]])
        length = int(batch["inputs"]["attention_mask"].sum())
        assert row.hidden.shape[0] == row.labels.shape[0] == length == cache.lengths[index]
        assert row.text_only == (index % 4 == 3)
        assert (row.text_hidden is None) == row.text_only


def test_trace_is_encoded_only_when_not_cached(world, cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the trunk ran")

    monkeypatch.setattr(world.model, "encode", refuse)
    batch = collate_features(cache.rows[:4])
    assert trace_of(world.model, batch).hidden.shape[0] == 4
    with pytest.raises(ValueError, match="no graph"):
        trace_of(world.model, batch, grad=True)


def test_save_and_load(tmp_path, cache):
    cache.save(tmp_path / "features")
    loaded = FeatureCache.load(tmp_path / "features")
    assert loaded.lengths == cache.lengths
    for mine, theirs in zip(loaded.rows, cache.rows, strict=True):
        assert torch.equal(mine.hidden, theirs.hidden)
        assert torch.equal(mine.labels, theirs.labels)
        assert (mine.position_ids is None) == (theirs.position_ids is None)
        if theirs.position_ids is not None:
            assert torch.equal(mine.position_ids, theirs.position_ids)
        assert mine.text_only == theirs.text_only
        assert (mine.text_hidden is None) == (theirs.text_hidden is None)


def test_damaged_caches_are_refused(tmp_path, cache):
    with pytest.raises(ValueError, match="cannot read feature cache"):
        FeatureCache.load(tmp_path)
    cache.save(tmp_path)
    tensors = tmp_path / "features.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"features\.safetensors"):
        FeatureCache.load(tmp_path)


def test_joining_progress_and_dtype(world):
    seen = []
    small = build_feature_cache(
        world.model,
        world.rows[:3],
        world.collator,
        batch_size=2,
        dtype=torch.bfloat16,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 3), (3, 3)]
    assert small[0].hidden.dtype == torch.bfloat16
    assert len(small + small) == 6
