"""Generation: the cached rollout against full forwards, steering, seeds, padding, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latent_rl.models import LatentGeneration
from latent_rl.models.backbone import extend_inputs, suppressed_token_ids
from tests.models.conftest import NUM_CODES, Case, build
from tests.tiny_models import ARCHITECTURES, render, tiny_image

STEPS = 10
# Cached steps and full forwards sum in different orders; tiny float32 models agree to a few 1e-6.
ATOL = 1e-5


def speak(case: Case, inputs: dict[str, Tensor] | None = None, **settings: Any) -> LatentGeneration:
    """Exactly STEPS tokens, so that no comparison is vacuous."""
    given = {"min_new_tokens": STEPS, **settings.pop("generation_kwargs", {})}
    settings = {"max_new_tokens": STEPS, "seed": 7, **settings}
    return case.model.generate(inputs or case.inputs, generation_kwargs=given, **settings)


def scored(case: Case, out: LatentGeneration, trace: Any) -> Tensor:
    """The policy's log-probabilities of the rollout's codes, from a whole-sequence pass."""
    logits = case.model.policy_logits(case.model.state(trace), trace)
    first = out.prompt_length - 1
    steps = logits[:, first : first + out.codes.shape[1]].log_softmax(-1)
    return steps.gather(-1, out.codes[..., None])[..., 0]


def retold(case: Case, out: LatentGeneration, full: dict[str, Tensor]) -> Tensor:
    """The most likely tokens [B, T] under the rollout's codes, from one uncached forward."""
    codes = torch.full(full["input_ids"].shape, -1)
    codes[:, out.prompt_length - 1 :] = out.codes
    logits = case.model(full, codes).logits[:, out.prompt_length - 1 :]
    # The rollout may say neither placeholders nor, here, the end.
    banned = [*suppressed_token_ids(case.model.config), case.processor.tokenizer.eos_token_id]
    logits[..., banned] = -torch.inf
    return logits.argmax(-1)


def test_cached_generation_equals_an_uncached_forward(case: Case) -> None:
    out = speak(case)
    assert out.codes.unique().numel() > 2
    assert out.completion_ids.unique().numel() > 2
    full = extend_inputs(case.inputs, out.completion_ids[:, :-1], out.completion_mask[:, :-1])
    trace = case.model.encode(full)
    torch.testing.assert_close(scored(case, out, trace), out.logprobs, rtol=0, atol=ATOL)
    assert torch.equal(retold(case, out, full), out.completion_ids)


def test_trace_replays_the_rollout(case: Case) -> None:
    out = speak(case, return_hidden=True)
    trace = out.trace
    assert trace is not None
    assert trace.hidden.shape[1] == out.sequences.shape[1] - 1
    torch.testing.assert_close(scored(case, out, trace), out.logprobs_full, rtol=0, atol=ATOL)
    full = extend_inputs(case.inputs, out.completion_ids[:, :-1], out.completion_mask[:, :-1])
    fresh = case.model.encode(full)
    # e_t of the frozen trunk: the codes have left no mark on it.
    real = trace.keep_mask
    torch.testing.assert_close(trace.hidden[real], fresh.hidden[real], rtol=0, atol=ATOL)
    one = trace.select(torch.tensor([1]))
    torch.testing.assert_close(
        scored(case, _row(out, 1), one), out.logprobs[1:2], rtol=0, atol=ATOL
    )


def _row(out: LatentGeneration, row: int) -> LatentGeneration:
    return out._replace(codes=out.codes[row : row + 1])


def test_trace_comes_from_the_rollout_itself_where_it_can() -> None:
    for name in ARCHITECTURES:
        case = build(name)
        calls: list[int] = []
        handle = case.model.decoder.register_forward_hook(lambda *_, c=calls: c.append(1))
        speak(case, return_hidden=True)
        handle.remove()
        # Gemma3 passes masks by layer type, which cannot be joined: one more forward.
        assert len(calls) == STEPS + (name == "gemma3"), name


def test_a_row_does_not_depend_on_its_batch(case: Case) -> None:
    seeds = torch.tensor([11, 12])
    both = speak(case, seed=seeds)
    texts, images = ["What is in the picture ?", "How many birds ? one"], [0, 1]
    assert not case.inputs["attention_mask"].all()  # one of them is padded
    for row, (text, image) in enumerate(zip(texts, images, strict=True)):
        alone = render(case.processor, [text], [tiny_image(image)])
        out = speak(case, alone, seed=seeds[row : row + 1])
        assert torch.equal(out.codes[0], both.codes[row])
        assert torch.equal(out.completion_ids[0], both.completion_ids[row])
        torch.testing.assert_close(out.logprobs[0], both.logprobs[row], rtol=0, atol=ATOL)


def test_static_cache_equals_dynamic(case: Case) -> None:
    dynamic = speak(case, return_hidden=True)
    static = speak(case, return_hidden=True, generation_kwargs={"cache_implementation": "static"})
    assert torch.equal(static.codes, dynamic.codes)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(static.logprobs, dynamic.logprobs, rtol=0, atol=ATOL)
    assert static.trace is not None
    torch.testing.assert_close(
        scored(case, static, static.trace), dynamic.logprobs, rtol=0, atol=ATOL
    )


def test_text_rows_and_image_rows_mix(case: Case) -> None:
    texts = ["What is in the picture ?", "How many birds ? one"]
    mixed = render(case.processor, texts, [tiny_image(), None])
    seeds = torch.tensor([5, 6])
    out = speak(case, mixed, seed=seeds, return_hidden=True)
    assert out.trace is not None
    assert out.trace.text_only.tolist() == [False, True]
    # The projector is remembered across the steps: replay through state() gives the same.
    torch.testing.assert_close(scored(case, out, out.trace), out.logprobs, rtol=0, atol=ATOL)
    # The merge reads the projected state too.
    full = extend_inputs(mixed, out.completion_ids[:, :-1], out.completion_mask[:, :-1])
    assert torch.equal(retold(case, out, full), out.completion_ids)
    for row, image in enumerate([tiny_image(), None]):
        alone = speak(case, render(case.processor, [texts[row]], [image]), seed=seeds[row, None])
        assert torch.equal(alone.codes[0], out.codes[row])
        assert torch.equal(alone.completion_ids[0], out.completion_ids[row])
    case.model.latent.projector = None
    assert not torch.equal(speak(case, mixed, seed=seeds).logprobs[1], out.logprobs[1])


def test_forced_codes_steer(case: Case) -> None:
    outs = [speak(case, forced_codes=code) for code in (3, 9)]
    assert (outs[0].codes == 3).all()
    assert not torch.equal(outs[0].completion_ids, outs[1].completion_ids)
    out = outs[0]
    full = extend_inputs(case.inputs, out.completion_ids[:, :-1], out.completion_mask[:, :-1])
    trace = case.model.encode(full)
    torch.testing.assert_close(scored(case, out, trace), out.logprobs_full, rtol=0, atol=ATOL)
    free = speak(case)
    again = speak(case, forced_codes=free.codes)
    assert torch.equal(again.sequences, free.sequences)


def test_forced_codes_where_given_and_the_policy_elsewhere(qwen: Case) -> None:
    free = speak(qwen)
    plan = torch.full((2, STEPS), -1)
    plan[0, 3] = 5
    out = speak(qwen, forced_codes=plan)
    assert torch.equal(out.codes[1], free.codes[1])
    assert torch.equal(out.codes[0, :3], free.codes[0, :3])
    assert out.codes[0, 3] == 5


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (NUM_CODES, ValueError, r"must be in \[-1, 16\)"),
        (-2, ValueError, r"must be in \[-1, 16\)"),
        (torch.zeros(2, STEPS - 1, dtype=torch.int64), ValueError, r"must be \[2, >= 10\]"),
        (torch.zeros(3, STEPS, dtype=torch.int64), ValueError, r"got \[3, 10\]"),
        (torch.zeros(2, STEPS), TypeError, "must be integers, got torch.float32"),
    ],
)
def test_bad_forced_codes(qwen: Case, codes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        speak(qwen, forced_codes=codes)


def test_seeds_repeat_and_differ(qwen: Case) -> None:
    first, same, other = speak(qwen, seed=1), speak(qwen, seed=1), speak(qwen, seed=2)
    assert torch.equal(first.codes, same.codes)
    assert not torch.equal(first.codes, other.codes)
    greedy = [speak(qwen, temperature=0.0, seed=s) for s in (1, 2)]
    assert torch.equal(greedy[0].codes, greedy[1].codes)
    assert not greedy[0].logprobs.any()  # certain under what was sampled from
    assert (greedy[0].logprobs_full < 0).all()
    with pytest.raises(ValueError, match=r"seed must be an int or \[2\]"):
        speak(qwen, seed=torch.tensor([1, 2, 3]))


def test_truncated_sampling_is_scored_as_sampled(qwen: Case) -> None:
    out = speak(qwen, top_k=2, temperature=0.7)
    assert (out.logprobs > out.logprobs_full).all()
    assert (out.entropies <= torch.log(torch.tensor(2.0)) + 1e-6).all()


def test_sampled_tokens_are_seeded_per_row(qwen: Case) -> None:
    seeds = torch.tensor([3, 4])
    first = speak(qwen, do_sample_tokens=True, seed=seeds)
    torch.manual_seed(123)
    assert torch.equal(speak(qwen, do_sample_tokens=True, seed=seeds).sequences, first.sequences)
    assert not torch.equal(speak(qwen, seed=seeds).sequences, first.sequences)
    other = speak(qwen, do_sample_tokens=True, seed=torch.tensor([3, 5]))
    assert torch.equal(other.sequences[0], first.sequences[0])
    assert not torch.equal(other.sequences[1], first.sequences[1])


def test_masks_end_with_the_first_eos(qwen: Case) -> None:
    free = speak(qwen)
    # A token the first row says and the second never does.
    first, second = free.completion_ids.tolist()
    eos = next(token for token in first[:-3] if token not in second)
    out = qwen.model.generate(
        qwen.inputs,
        max_new_tokens=STEPS,
        seed=7,
        return_hidden=True,
        generation_kwargs={"eos_token_id": eos},
    )
    for row in range(2):
        ids = out.completion_ids[row].tolist()
        length = ids.index(eos) + 1 if eos in ids else len(ids)
        assert out.completion_mask[row].tolist() == [i < length for i in range(len(ids))]
    assert not out.completion_mask.all()
    for numbers, filler in ((out.codes, -1), (out.logprobs, 0), (out.entropies, 0)):
        assert (numbers[~out.completion_mask] == filler).all()
    assert out.trace is not None
    expected = out._replace(codes=out.codes.clamp_min(0))
    gap = (scored(qwen, expected, out.trace) - out.logprobs)[out.completion_mask]
    assert gap.abs().max() < ATOL


def test_placeholders_are_never_said(qwen: Case) -> None:
    placeholder = qwen.model.config.image_token_id
    head = qwen.model.backbone.get_output_embeddings()
    handle = head.register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor([placeholder]), 1e4)
    )
    out = speak(qwen)
    handle.remove()
    assert not (out.completion_ids == placeholder).any()


def test_right_padding_and_several_sequences_are_refused(qwen: Case) -> None:
    flipped = dict(qwen.inputs, attention_mask=qwen.inputs["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="padded on the left"):
        speak(qwen, flipped)
    for name in ("num_beams", "num_return_sequences"):
        with pytest.raises(ValueError, match=f"{name} must be 1"):
            speak(qwen, generation_kwargs={name: 2})
    with pytest.raises(ValueError, match="must not have do_sample"):
        speak(qwen, generation_kwargs={"do_sample": True})
    with pytest.raises(ValueError, match="max_new_tokens must be >= 1"):
        qwen.model.generate(qwen.inputs, max_new_tokens=0)


def test_an_interrupted_rollout_leaves_the_base_model(qwen: Case) -> None:
    with qwen.model.disabled():
        before = qwen.model(qwen.inputs).logits
    qwen.model.train()
    handle = qwen.model.latent.policy.head.register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="stop here"):
        speak(qwen)
    handle.remove()
    assert qwen.model.training
    assert torch.equal(qwen.model.backbone(**qwen.inputs).logits, before)


def _fail(*_: Any) -> None:
    raise RuntimeError("stop here")


def test_rollout_in_train_mode_is_the_eval_rollout(qwen: Case) -> None:
    expected = speak(qwen)
    qwen.model.train()
    out = speak(qwen)
    assert torch.equal(out.sequences, expected.sequences)
    assert qwen.model.latent.training
    assert not qwen.model.backbone.training
