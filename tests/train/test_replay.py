"""Replay: whatever holds the states and however they are laid out, the update is the same."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from latent_rl import ops
from latent_rl.train.replay import (
    LAYOUTS,
    Replay,
    ReplayStates,
    action_logits,
    attention,
    kernels,
    micro_batches,
)
from latent_rl.train.replay.attention import prepare_tower
from latent_rl.train.replay.kernels import FlashVarlen, SdpaBlocks, choose_kernel
from tests.tiny_models import ARCHITECTURES
from tests.train.replay_world import (
    G,
    loss_and_gradients,
    of_replay,
    of_trace,
    replay_of,
    rollout,
)

# float32 sums in another order, over sequences of other lengths.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def test_the_rollouts_are_ragged_and_not_trivial():
    replay = replay_of()
    assert len({group.prompt for group in replay.states.groups}) == 2
    assert replay.keep_mask.sum(1).tolist() == [8, 4, 0, 6, 1, 7]
    assert len(set(replay.codes.flatten().tolist())) > 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_give_the_loss_and_gradients_of_padded_ones(architecture):
    loss, gradients = loss_and_gradients(architecture, of_trace(architecture))
    packed = loss_and_gradients(architecture, of_replay(replay_of(architecture)))
    torch.testing.assert_close(packed[0], loss, **CLOSE)
    assert len(gradients) > 10
    for ours, truth in zip(packed[1], gradients, strict=True):
        torch.testing.assert_close(
            ours, truth, rtol=1e-3, atol=1e-5 * float(truth.abs().max()) + 1e-6
        )


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gemma3"])
def test_padded_layout_gives_the_same(architecture):
    packed = loss_and_gradients(architecture, of_replay(replay_of(architecture)))
    padded = loss_and_gradients(architecture, of_replay(replay_of(architecture, "padded")))
    torch.testing.assert_close(packed[0], padded[0], **CLOSE)
    for ours, truth in zip(packed[1], padded[1], strict=True):
        torch.testing.assert_close(
            ours, truth, rtol=1e-3, atol=1e-5 * float(truth.abs().max()) + 1e-6
        )


def test_a_window_is_seen():
    """Gemma3's window of 16 hides what a plain causal mask would show."""
    replay = replay_of("gemma3")
    assert replay.states.groups[0].prompt > 16
    assert replay.states.groups[0].masks
    with pytest.raises(ValueError, match='replay_layout="packed"'):
        replay_of("gemma3", "padded").batch([0])


def test_a_micro_batch_has_real_positions_alone():
    replay = replay_of()
    batch = replay.batch([0, 1, 2, 4])
    prompts = [group.prompt for group in replay.states.groups]
    # Row 0 needs 8 states behind its prompt, row 1 three, row 2 nothing, row 4 its prompt alone.
    assert batch.states.hidden.shape[:2] == (1, sum(prompts) + 8 + 3)
    assert len(batch.states.action) == len(batch.cells) == 8 + 4 + 1
    assert batch.codes.shape == (4, 9)
    assert replay.batch([4]).codes.shape == (1, 1)


def test_the_order_of_rows_does_not_matter():
    replay = replay_of()
    model, _, _ = rollout("qwen2_5_vl")
    with torch.no_grad():
        straight = action_logits(model.latent.policy, replay.batch(range(6)))
        order = [5, 0, 3, 1, 4]
        mixed = action_logits(model.latent.policy, replay.batch(order))
    torch.testing.assert_close(mixed, straight[order], **CLOSE)
    assert straight[0, 3].abs().max() > 0
    assert (straight[2] == 0).all()


def test_rescored_logprobs_equal_those_of_the_rollout():
    model, _, generation = rollout("qwen2_5_vl")
    whole = replay_of(keep_mask=generation.completion_mask)
    with torch.no_grad():
        batch = whole.batch(range(6))
        logits = action_logits(model.latent.policy, batch)
        scored = ops.code_logprobs(logits, batch.codes).logprob
    mask = generation.completion_mask
    # Cached decoding against one pass.
    torch.testing.assert_close(scored[mask], generation.logprobs[mask], rtol=1e-4, atol=1e-5)


def test_rows_without_a_kept_step_still_give_a_graph():
    replay = replay_of(keep_mask=torch.zeros(6, 9, dtype=torch.bool))
    model, _, _ = rollout("qwen2_5_vl")
    logits = action_logits(model.latent.policy, replay.batch([0, 5]))
    assert logits.shape == (2, 1, 8)
    logits.sum().backward()
    weight = model.latent.policy.head.weight
    assert (weight.grad == 0).all()
    model.zero_grad()


def test_device_and_host_agree_bitwise_and_recomputing_within_rounding():
    found = {
        store: loss_and_gradients("qwen2_5_vl", of_replay(replay_of(store=store)))
        for store in ("device", "host", "recompute")
    }
    loss, gradients = found["device"]
    assert torch.equal(found["host"][0], loss)
    for ours, truth in zip(found["host"][1], gradients, strict=True):
        assert torch.equal(ours, truth)
    # The trunk runs over whole sequences where the rollout ran token by token.
    torch.testing.assert_close(found["recompute"][0], loss, **CLOSE)
    for ours, truth in zip(found["recompute"][1], gradients, strict=True):
        torch.testing.assert_close(
            ours, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max()) + 1e-6
        )


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_vl"])
def test_recomputed_states_are_those_of_the_rollout(architecture):
    kept, again = (replay_of(architecture, store=s) for s in ("device", "recompute"))
    for ours, truth in zip(
        again.states.fetch(range(6), [8, 3, 1, 5, 0, 6])[1],
        kept.states.fetch(range(6), [8, 3, 1, 5, 0, 6])[1],
        strict=True,
    ):
        assert ours.lengths == truth.lengths
        assert torch.equal(
            ours.positions - ours.positions.min(), truth.positions - truth.positions.min()
        )
        torch.testing.assert_close(ours.hidden, truth.hidden, rtol=1e-3, atol=1e-4)
        assert {k: m.tolist() for k, m in ours.masks.items()} == {
            k: m.tolist() for k, m in truth.masks.items()
        }


def test_prompts_are_held_once():
    replay = replay_of()
    _, _, generation = rollout("qwen2_5_vl")
    states = sum(len(group.hidden) for group in replay.states.groups)
    lengths = generation.completion_mask.sum(1)
    prompts = generation.trace.keep_mask[:, : generation.prompt_length].sum(1)
    assert states == int((lengths - 1).sum() + prompts[::G].sum())


@pytest.mark.parametrize("store", ["device", "host", "recompute"])
def test_a_replay_survives_its_state(store):
    replay = replay_of(store=store, layout="padded", ref_logits=torch.randn(6, 9, 8))
    model, _, _ = rollout("qwen2_5_vl")
    tensors, meta = replay.state()
    assert all(value.is_contiguous() for value in tensors.values())
    back = Replay.from_state(tensors, json.loads(json.dumps(meta)), model)
    assert type(back.states.stores[1]) is type(replay.states.stores[1])
    assert back.layout is LAYOUTS["padded"]
    loss, gradients = loss_and_gradients("qwen2_5_vl", of_replay(replay))
    again = loss_and_gradients("qwen2_5_vl", of_replay(back))
    assert torch.equal(again[0], loss)
    assert all(torch.equal(a, b) for a, b in zip(again[1], gradients, strict=True))
    assert torch.equal(back.ref_logits, replay.ref_logits)
    assert back.old_logprobs is None
    with pytest.raises(ValueError, match="format must be 2, got 7"):
        Replay.from_state(tensors, {**meta, "format": 7}, model)
    tensors.pop("codes")
    with pytest.raises(ValueError, match="codes"):
        Replay.from_state(tensors, meta, model)


def test_gradient_checkpointing_recomputes_the_same():
    model, _, _ = rollout("qwen2_5_vl")
    plain = loss_and_gradients("qwen2_5_vl", of_replay(replay_of()))
    tower = model.latent.policy.tower
    model.activation_checkpointing_enable({"use_reentrant": False})
    tower.train()
    passes = []
    handle = tower.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    try:
        again = loss_and_gradients("qwen2_5_vl", of_replay(replay_of()))
    finally:
        handle.remove()
        model.activation_checkpointing_disable()
        tower.eval()
    assert len(passes) == 2
    assert torch.equal(again[0], plain[0])
    for ours, truth in zip(again[1], plain[1], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-7)
    # Without a packing the tower does what it always did.
    of_trace("qwen2_5_vl")(model.latent.policy)
    assert tower.config._attn_implementation == "sdpa"


def test_states_of_different_stores_mix_in_a_micro_batch():
    here, host, again = (replay_of(store=s).states.groups for s in ("device", "host", "recompute"))
    model, _, _ = rollout("qwen2_5_vl")
    plain = loss_and_gradients("qwen2_5_vl", of_replay(replay_of()))
    for first, second in ((here, host), (host, here), (again, here)):
        mixed = replay_of(states=ReplayStates.of([first[0], second[1]], model))
        mixed.prefetch(range(6))
        got = loss_and_gradients("qwen2_5_vl", of_replay(mixed))
        torch.testing.assert_close(got[0], plain[0], **CLOSE)


def test_micro_batches_keep_groups_together_within_a_step():
    lengths = [1 + row % 5 for row in range(16)]
    whole = micro_batches(lengths, 4, 4, [0, 0, 0, 0], 1)
    assert sorted(row for batch in whole for row in batch) == list(range(16))
    assert all(len({row // 4 for row in batch}) == 1 for batch in whole)
    # Rows are dealt to the optimizer's steps at random, as without packing.
    apart = micro_batches(lengths, 4, 4, [0, 0, 1, 1], 1)
    first = {row for batch in apart[:2] for row in batch}
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    assert first == set(order[:8])
    assert whole != micro_batches(lengths, 4, 4, [0, 0, 0, 0], 2)


def test_the_last_layer_passes_over_prompts_for_keys_and_values_alone():
    replay = replay_of()
    model, _, _ = rollout("qwen2_5_vl")
    batch, layers = replay.batch(range(6)), model.latent.policy.tower.layers
    seen: dict[str, int] = {}
    handles = [
        module.register_forward_hook(
            lambda m, args, out, n=name: seen.update({n: args[0].shape[1]})
        )
        for name, module in {
            "first": layers[0].mlp.gate_proj,
            "last": layers[-1].mlp.gate_proj,
            "keys": layers[-1].self_attn.k_proj,
        }.items()
    ]
    with torch.no_grad():
        action_logits(model.latent.policy, batch)
    for handle in handles:
        handle.remove()
    positions = batch.states.hidden.shape[1]
    prompts = [group.prompt for group in replay.states.groups]
    assert seen == {"first": positions, "last": positions - sum(prompts) + 2, "keys": positions}


def varlen(
    q, k, v, ends_q, ends_k, most_q, most_k, *, dropout_p, softmax_scale, causal, window_size
):
    """What flash-attention documents: sequences end to end, causal from the last key backwards."""
    assert causal
    assert dropout_p == 0
    out = []
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for i in range(len(ends_q) - 1):
        own_q, own_k = (slice(int(e[i]), int(e[i + 1])) for e in (ends_q, ends_k))
        a, b = own_q.stop - own_q.start, own_k.stop - own_k.start
        assert a <= most_q
        assert b <= most_k
        distance = torch.arange(b - a, b)[:, None] - torch.arange(b)
        seen = distance >= 0
        if window_size != (-1, -1):
            assert window_size[1] == 0
            seen &= distance <= window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q[own_q], k[own_k]) * softmax_scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[own_k]))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_is_asked_for_the_same(window):
    packing = replay_of().batch(range(6)).states.tower_kwargs["packing"]
    length = len(packing.restore)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(length, heads, 16, generator=generator) for heads in (4, 2, 2))
    for part in (packing, packing.final):
        found = [
            kernel.attend(query, key, value, part, scaling=0.3, window=window, dropout=0.0)
            for kernel in (SdpaBlocks(), FlashVarlen(varlen))
        ]
        assert len(found[0]) == length - part.begin
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_masked_blocks_hold_no_scores_where_heads_share_keys(monkeypatch):
    packing = replay_of().batch(range(6)).states.tower_kwargs["packing"]
    length = len(packing.restore)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(length, heads, 16, generator=generator) for heads in (4, 2, 2))
    expected = SdpaBlocks().attend(
        query, key, value, packing, scaling=0.3, window=None, dropout=0.0
    )
    masked = []

    def watched(q, k, v, *, attn_mask, enable_gqa, **kwargs):
        # PyTorch's fast CUDA kernels take shared heads or a mask, not both.
        assert attn_mask is None or not enable_gqa
        masked.append(attn_mask is not None)
        return original(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa, **kwargs)

    original = kernels.scaled_dot_product_attention
    monkeypatch.setattr(kernels, "scaled_dot_product_attention", watched)
    found = SdpaBlocks(repeats_keys=True).attend(
        query, key, value, packing, scaling=0.3, window=None, dropout=0.0
    )
    assert any(masked)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_attention_is_chosen_by_the_dtype_it_runs_in(monkeypatch):
    packing = replay_of().batch(range(6)).states.tower_kwargs["packing"]
    length = len(packing.restore)
    query, key, value = (torch.randn(1, heads, length, 16) for heads in (4, 2, 2))
    given = []
    choose = attention.choose_kernel
    monkeypatch.setattr(
        attention, "choose_kernel", lambda q, p: given.append(q.dtype) or choose(q, p)
    )
    with torch.autocast("cpu", torch.bfloat16):
        attention.packed_attention(None, query, key, value, None, packing=packing)
    attention.packed_attention(None, query, key, value, None, packing=packing)
    assert given == [torch.bfloat16, torch.float32]


def test_cuda_never_gets_shared_heads_with_a_mask():
    query = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(7, 4, 16))
    packing = replay_of().batch(range(6)).states.tower_kwargs["packing"]
    assert choose_kernel(query, packing) == SdpaBlocks(repeats_keys=True)
    assert choose_kernel(torch.ones(7, 4, 16), packing) == SdpaBlocks()


def test_towers_that_cannot_pack_are_named():
    model, _, _ = rollout("llava")
    tower = copy.deepcopy(model.latent.policy.tower)
    tower._latent_rl_packs = False
    tower.config.attn_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r'it caps attention scores; set replay_layout="padded"'):
        prepare_tower(tower)
