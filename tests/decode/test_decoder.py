"""The engine says what ``generate`` says: all architectures, batches, refills, prompts shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latent_rl.decode import DecodeOutput, DecodePlan, Decoder
from latent_rl.models import LatentGeneration
from tests.models.conftest import Case, build
from tests.tiny_models import ARCHITECTURES, render, tiny_image

STEPS = 10
# Engine and generate() sum in different orders; tiny float32 models agree to a few 1e-6.
ATOL = 1e-5
TEXTS = ["What is in the picture ?", "How many birds ? one", "What ?", "one two three ?"]


@pytest.fixture(params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> Case:
    """One architecture after another."""
    return build(request.param)


@pytest.fixture
def qwen() -> Case:
    """Qwen2.5-VL alone, for what does not depend on the architecture."""
    return build("qwen2_5_vl")


def plain(case: Case, inputs: dict[str, Tensor], **settings: Any) -> LatentGeneration:
    """What ``generate`` says in exactly STEPS tokens."""
    given = {"min_new_tokens": STEPS}
    return case.model.generate(
        inputs, **{"max_new_tokens": STEPS, "seed": 7, **settings}, generation_kwargs=given
    )


def engine(case: Case, inputs: Any, slots: int = 64, **settings: Any) -> DecodeOutput:
    """What the engine says in exactly STEPS tokens."""
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "seed": 7, **settings}
    return Decoder(case.model, slots=slots).generate(inputs, **settings)


def same(mine: LatentGeneration, theirs: LatentGeneration) -> None:
    """Tokens and codes equal, numbers close."""
    assert torch.equal(mine.sequences, theirs.sequences)
    assert torch.equal(mine.codes, theirs.codes)
    assert torch.equal(mine.completion_mask, theirs.completion_mask)
    for name in ("logprobs", "logprobs_full", "entropies"):
        torch.testing.assert_close(
            getattr(mine, name), getattr(theirs, name), rtol=0, atol=ATOL, msg=name
        )


def batch_of(case: Case, rows: int) -> dict[str, Tensor]:
    """Prompts of different lengths, every third without an image."""
    images = [None if i % 3 == 2 else tiny_image(i) for i in range(rows)]
    return render(case.processor, [TEXTS[i % 4] for i in range(rows)], images)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {"do_sample_tokens": True},
        {"forced_codes": 3},
    ],
    ids=str,
)
def test_equals_generate(case, settings) -> None:
    expected = plain(case, case.inputs, **settings)
    assert expected.completion_ids.unique().numel() > 2
    out = engine(case, case.inputs, **settings)
    same(out.generation, expected)
    assert out.finish_reasons == ("length", "length")


def test_static_caches_of_generate_say_the_same(case) -> None:
    static = case.model.generate(
        case.inputs,
        max_new_tokens=STEPS,
        seed=7,
        generation_kwargs={"min_new_tokens": STEPS, "cache_implementation": "static"},
    )
    same(engine(case, case.inputs).generation, static)


def test_batch_of_one_and_of_sixteen_with_refills(case) -> None:
    inputs = batch_of(case, 16)
    seeds = torch.arange(100, 116)
    expected = plain(case, inputs, seed=seeds)
    for slots in (16, 5, 1):
        same(engine(case, inputs, slots=slots, seed=seeds).generation, expected)


def test_generations_of_a_prompt_share_its_prefill(case) -> None:
    repeated = {
        name: value.repeat_interleave(3, 0)
        for name, value in render(case.processor, TEXTS[:1], [None]).items()
    }
    expected = plain(case, repeated, seed=5)
    reads: list[int] = []
    handle = case.model.decoder.register_forward_hook(
        lambda module, args, kwargs, out: reads.append(out.last_hidden_state.shape[1]),
        with_kwargs=True,
    )
    single = render(case.processor, TEXTS[:1], [None])
    out = engine(case, single, num_generations=3, seed=5, slots=2)
    handle.remove()
    same(out.generation, expected)
    assert len([length for length in reads if length > 1]) == 1


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("slots", [3, 5])
def test_few_places_for_prompts_make_the_queue_wait(qwen, monkeypatch, slots, overlap) -> None:
    """Rows of very different lengths, so that old prompts hold their places for long."""
    inputs = batch_of(qwen, 6)
    limits = [1, 9, 2, 7, 3, 12, 1, 1, 5, 4, 8, 2]
    settings = {"max_new_tokens": limits, "min_new_tokens": 0, "num_generations": 2, "seed": 5}
    plenty = Decoder(qwen.model, slots=12).generate(inputs, **settings).generation
    monkeypatch.setattr("latent_rl.decode.engine._OVERLAP", overlap)
    decoder = Decoder(qwen.model, slots=slots)
    out = decoder.generate(inputs, **settings).generation
    assert decoder._workspace is not None
    assert decoder._workspace.layout.prompts <= 1 + overlap * 3
    same(out, plenty)


def test_prompts_are_read_together_as_the_plan_says(qwen, monkeypatch) -> None:
    inputs = batch_of(qwen, 12)
    reads: list[int] = []
    qwen.model.decoder.register_forward_hook(
        lambda module, args, kwargs, out: (
            reads.append(out.last_hidden_state.shape[0])
            if out.last_hidden_state.shape[1] > 1
            else None
        ),
        with_kwargs=True,
    )
    sizes = {
        "requests": 12, "prompt_tokens": inputs["input_ids"].shape[1], "new_tokens": 6,
    }  # fmt: skip

    def run(**options: Any) -> tuple[LatentGeneration, DecodePlan, list[int]]:
        reads.clear()
        decoder = Decoder(qwen.model, **options)
        settings = {"max_new_tokens": 6, "min_new_tokens": 0, "seed": 5}
        out = decoder.generate(inputs, **settings).generation
        return out, decoder.plan(**sizes), [*reads]

    together, plan, found = run()
    # Little beside 64 MiB.
    assert (found, plan.prefill_prompts) == ([12], 12)
    given, plan, found = run(prefill_prompts=5)
    assert (found, plan.prefill_prompts) == ([5, 5, 2], 5)
    monkeypatch.setattr("latent_rl.decode.memory._LEAST_PREFILL_BYTES", 0)
    by_share, plan, found = run()
    many = plan.prefill_prompts
    assert 1 <= many < 12
    assert found == [many] * (12 // many) + [12 % many] * (12 % many > 0)
    each = plan.prefill_bytes // many
    assert many == 1 or plan.prefill_bytes <= plan.cache_bytes / 4 < plan.prefill_bytes + each
    kept = plan.cache_bytes + plan.tables_bytes + plan.results_bytes + plan.replay_bytes
    assert plan.new_bytes == kept + plan.prefill_bytes
    same(given, together)
    same(by_share, together)


def test_completions_of_a_prompt_share_its_keys(qwen) -> None:
    decoder = Decoder(qwen.model, slots=64)
    sizes = {"requests": 64, "prompt_tokens": 96, "new_tokens": 20}
    apart = decoder.plan(**sizes, num_generations=1).cache_bytes
    shared = decoder.plan(**sizes, num_generations=8).cache_bytes
    # 8 prompts and 64 slots against 64 of both.
    assert apart * (8 * 96 + 64 * 20) == shared * (64 * 96 + 64 * 20)


def test_right_padding_is_no_different(qwen) -> None:
    left = batch_of(qwen, 4)
    right = dict(left)
    for name, value in left.items():
        if value.shape == left["input_ids"].shape:
            rows = zip(value, left["attention_mask"].bool(), strict=True)
            right[name] = torch.stack([torch.cat([row[keep], row[~keep]]) for row, keep in rows])
    same(engine(qwen, right).generation, engine(qwen, left).generation)


def test_prompts_one_by_one_equal_a_batch(case) -> None:
    images = [tiny_image(i) for i in range(3)]
    one_by_one = [
        render(case.processor, [text], [image])
        for text, image in zip(TEXTS[:3], images, strict=True)
    ]
    together = render(case.processor, TEXTS[:3], images)
    same(engine(case, one_by_one).generation, engine(case, together).generation)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_images_of_different_sizes(name) -> None:
    case = build(name)
    sizes = [16, 32, 24]
    together = render(case.processor, TEXTS[:3], [tiny_image(i, p) for i, p in enumerate(sizes)])
    assert len({int(n) for n in together["image_grid_thw"].prod(-1)}) > 1
    seeds = torch.tensor([1, 2, 3])
    same(engine(case, together, seed=seeds).generation, plain(case, together, seed=seeds))


def test_natural_ends_and_their_reasons(case) -> None:
    # Tokens that often come serve as ends, so that rows stop at different steps.
    free = plain(case, batch_of(case, 8)).completion_ids
    ends = free[:, 3:5].flatten().unique()[:3].tolist()
    expected = case.model.generate(
        batch_of(case, 8), max_new_tokens=STEPS, seed=7, generation_kwargs={"eos_token_id": ends}
    )
    lengths = expected.completion_mask.sum(1)
    assert lengths.unique().numel() > 1
    for slots in (8, 3):
        out = engine(case, batch_of(case, 8), min_new_tokens=0, eos_token_id=ends, slots=slots)
        got = out.generation
        keep = expected.completion_mask
        assert torch.equal(got.completion_mask, keep)
        assert torch.equal(got.codes, expected.codes)
        assert torch.equal(got.completion_ids[keep], expected.completion_ids[keep])
        for row, reason in enumerate(out.finish_reasons):
            last = int(got.completion_ids[row, lengths[row] - 1])
            assert reason == ("stop" if last in ends else "length")


def test_the_trace_replays_the_rollout(case) -> None:
    inputs = batch_of(case, 4)
    expected = plain(case, inputs, return_hidden=True)
    got = engine(case, inputs, return_hidden=True, slots=3).generation
    assert got.trace is not None
    assert expected.trace is not None
    keep = expected.trace.keep_mask
    assert torch.equal(got.trace.keep_mask, keep)
    assert torch.equal(got.trace.text_only, expected.trace.text_only)
    torch.testing.assert_close(
        got.trace.hidden[keep], expected.trace.hidden[keep], rtol=0, atol=ATOL
    )
    model, first = case.model, got.prompt_length - 1
    for trace in (got.trace, got.trace.select(torch.tensor([2, 0]))):
        logits = model.policy_logits(model.state(trace), trace)[:, first:].log_softmax(-1)
        rows = slice(None) if trace is got.trace else torch.tensor([2, 0])
        scored = logits.gather(-1, got.codes[rows][..., None])[..., 0]
        torch.testing.assert_close(scored, got.logprobs_full[rows], rtol=0, atol=2 * ATOL)


def test_hidden_states_in_the_dtype_asked_for_and_not_copied(qwen) -> None:
    decoder = Decoder(qwen.model, hidden_dtype=torch.bfloat16)
    run = decoder.start(qwen.inputs, max_new_tokens=4, return_hidden=True)
    trace = run.finish().generation.trace
    assert trace is not None
    assert trace.hidden.dtype == torch.bfloat16
    held = run._results.hidden
    assert held is not None
    assert trace.hidden.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()


def test_limits_by_request(qwen) -> None:
    limits = [3, 9]
    out = engine(qwen, qwen.inputs, max_new_tokens=limits, min_new_tokens=0, slots=1)
    assert out.generation.completion_mask.sum(1).tolist() == limits
    whole = engine(qwen, qwen.inputs).generation
    assert torch.equal(out.generation.codes[1], whole.codes[1, :9])
    assert torch.equal(out.generation.codes[0, :3], whole.codes[0, :3])


def test_the_base_model(case) -> None:
    expected_ids = plain_base(case)
    with case.model.disabled():
        out = engine(case, case.inputs)
    assert torch.equal(out.generation.completion_ids, expected_ids)
    assert (out.generation.codes == -1).all()


def plain_base(case: Case) -> Tensor:
    with case.model.disabled():
        return plain(case, case.inputs).completion_ids


def test_allowed_codes(qwen) -> None:
    out = engine(qwen, qwen.inputs, allowed_codes=[2, 5], temperature=20.0).generation
    assert set(out.codes.unique().tolist()) == {2, 5}
    by_row = torch.zeros(2, 16, dtype=torch.bool)
    by_row[0, 1] = by_row[1, 4] = True
    out = engine(qwen, qwen.inputs, allowed_codes=by_row, slots=1).generation
    assert (out.codes == torch.tensor([[1], [4]])).all()
    # One code is left: it is certain.
    assert (out.logprobs == 0).all()


def test_forced_codes_by_request_and_step(qwen) -> None:
    free = engine(qwen, qwen.inputs).generation
    forced = torch.full((2, STEPS), -1)
    forced[0, 4] = (free.codes[0, 4] + 1) % 16
    out = engine(qwen, qwen.inputs, forced_codes=forced, slots=1).generation
    assert torch.equal(out.codes[1], free.codes[1])
    assert out.codes[0, 4] == forced[0, 4]
    assert torch.equal(out.codes[0, :4], free.codes[0, :4])


def test_stop_strings(qwen) -> None:
    tokenizer = qwen.processor.tokenizer
    whole = engine(qwen, qwen.inputs).generation
    stop = tokenizer.decode(whole.completion_ids[0, 4:5])
    assert stop.strip()
    decoder = Decoder(qwen.model, tokenizer=tokenizer, check_every=3)
    out = decoder.generate(
        qwen.inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, seed=7, stop_strings=[stop]
    )
    length = int(out.generation.completion_mask[0].sum())
    assert out.finish_reasons[0] == "stop_string"
    texts = [tokenizer.decode(whole.completion_ids[0, :n]) for n in range(1, STEPS + 1)]
    assert length == next(n for n, text in enumerate(texts, 1) if stop in text)


def test_looking_rarely_changes_nothing(qwen) -> None:
    inputs = batch_of(qwen, 6)
    ends = plain(qwen, inputs).completion_ids[:, 3].unique()[:2].tolist()
    outs = [
        Decoder(qwen.model, slots=2, check_every=every).generate(
            inputs, max_new_tokens=STEPS, seed=7, eos_token_id=ends
        )
        for every in (1, 4, 100)
    ]
    for out in outs[1:]:
        same(out.generation, outs[0].generation)
        assert out.finish_reasons == outs[0].finish_reasons


def test_streaming_gives_every_token_once_in_order(qwen) -> None:
    inputs = batch_of(qwen, 5)
    whole = engine(qwen, inputs, slots=2)
    run = Decoder(qwen.model, slots=2).start(
        inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, seed=7
    )
    tokens: dict[int, list[int]] = {i: [] for i in range(5)}
    codes: dict[int, list[int]] = {i: [] for i in range(5)}
    ended: dict[int, str] = {}
    for piece in run:
        assert piece.request not in ended
        tokens[piece.request] += piece.tokens
        codes[piece.request] += piece.codes
        if piece.finish_reason:
            ended[piece.request] = piece.finish_reason
    assert list(tokens.values()) == whole.generation.completion_ids.tolist()
    assert list(codes.values()) == whole.generation.codes.tolist()
    assert ended == dict(enumerate(whole.finish_reasons))
    same(run.output().generation, whole.generation)
    with pytest.raises(RuntimeError, match="iterated once"):
        next(iter(run))


def test_updated_weights_are_seen_and_inference_mode_works(qwen) -> None:
    decoder = Decoder(qwen.model)
    settings: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "seed": 7}
    before = decoder.generate(qwen.inputs, **settings).generation
    with torch.no_grad():
        qwen.model.latent.policy.head.weight.neg_()
    with torch.inference_mode():
        after = decoder.generate(qwen.inputs, **settings).generation
    assert not torch.equal(before.codes, after.codes)
    same(after, plain(qwen, qwen.inputs))
    same(decoder.generate(qwen.inputs, **settings).generation, after)


def test_train_mode_is_kept_and_dropout_is_off(qwen) -> None:
    qwen.model.train()
    out = engine(qwen, qwen.inputs)
    assert qwen.model.training
    assert qwen.model.latent.policy.training
    same(out.generation, plain(qwen, qwen.inputs))


def test_under_ddp_and_peft(qwen) -> None:
    peft = pytest.importorskip("peft")
    from latent_rl.models import LatentActionModel, LatentConfig
    from tests.tiny_models import tiny_vlm

    class Wrapped(torch.nn.Module):
        """What DistributedDataParallel looks like from outside."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    backbone, processor = tiny_vlm("qwen2_5_vl")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    lora = peft.get_peft_model(backbone, config)
    model = LatentActionModel(lora, LatentConfig(num_codes=16, inverse_layers=1, policy_layers=2))
    case = Case(model, processor, qwen.inputs)
    decoder = Decoder(Wrapped(model))
    out = decoder.generate(qwen.inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, seed=7)
    same(out.generation, plain(case, qwen.inputs))


@pytest.mark.slow
def test_compiled_step_says_the_same(qwen) -> None:
    """Also where slots end, are refilled and run out."""
    inputs = batch_of(qwen, 5)
    settings = {"max_new_tokens": [6, 3, 7, 2, 5], "min_new_tokens": 0, "seed": 7}
    out = Decoder(qwen.model, compile=True, slots=3).generate(inputs, **settings)
    same(out.generation, Decoder(qwen.model).generate(inputs, **settings).generation)


@pytest.mark.slow
def test_a_compiled_step_sees_a_changed_model(qwen) -> None:
    """Guards are skipped within a stretch of steps, never between calls."""
    decoder = Decoder(qwen.model, compile=True)
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "seed": 7}
    layer = qwen.model.decoder.layers[0]
    before = layer.mlp
    try:
        first = decoder.generate(qwen.inputs, **settings).generation
        layer.mlp = torch.nn.Sequential(before, torch.nn.Tanh())
        second = decoder.generate(qwen.inputs, **settings).generation
        same(second, plain(qwen, qwen.inputs))
        assert not torch.equal(first.sequences, second.sequences)
    finally:
        layer.mlp = before


def test_under_autocast(qwen) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = engine(qwen, qwen.inputs, temperature=0.0)
    # bfloat16 sums in two orders part ways in time; the first step is the same.
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(qwen, qwen.inputs, temperature=0.0)
    assert torch.equal(out.generation.codes[:, 0], expected.codes[:, 0])
    assert out.generation.logprobs.isfinite().all()
