"""Bad input, bad prompts, interruptions and memory: clear words, and nothing finished is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latent_rl.decode import DecodeError, DecodePlan, Decoder
from latent_rl.decode.prompts import join_prompts, split_prompts
from tests.models.conftest import Case, build
from tests.tiny_models import ARCHITECTURES, render, tiny_image

TEXTS = ["What is in the picture ?", "How many birds ? one", "What ?"]


@pytest.fixture
def qwen() -> Case:
    return build("qwen2_5_vl")


@pytest.fixture
def trio(qwen) -> list[dict[str, torch.Tensor]]:
    """Three prompts, one by one."""
    return [render(qwen.processor, [t], [tiny_image(i)]) for i, t in enumerate(TEXTS)]


def run(case: Case, inputs: Any, **settings: Any) -> Any:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "seed": 1, **settings}
    return Decoder(case.model).generate(inputs, **options)


def test_a_bad_image_fails_its_own_requests_alone(qwen, trio) -> None:
    good = run(qwen, trio, seed=torch.arange(6), num_generations=2)
    broken = [dict(p) for p in trio]
    broken[1]["pixel_values"] = broken[1]["pixel_values"][:, :-1]
    decoder = Decoder(qwen.model, slots=3)
    with pytest.raises(DecodeError, match=r"2 of 6 requests failed; request 2: ") as caught:
        decoder.generate(
            broken, max_new_tokens=5, min_new_tokens=5, seed=torch.arange(6), num_generations=2
        )
    out = caught.value.output
    assert out.finish_reasons == ("length", "length", "failed", "failed", "length", "length")
    rest = [0, 1, 4, 5]
    assert torch.equal(out.generation.codes[rest], good.generation.codes[rest])
    assert not out.generation.completion_mask[2:4].any()
    assert set(caught.value.errors) == {2, 3}
    again = decoder.generate(
        trio, max_new_tokens=5, min_new_tokens=5, seed=torch.arange(6), num_generations=2
    )
    assert torch.equal(again.generation.sequences, good.generation.sequences)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
def test_an_interrupted_run_keeps_what_was_finished(qwen, trio, error) -> None:
    good = run(qwen, trio)
    decoder = Decoder(qwen.model, slots=1)
    calls = {"n": 0}

    def explode(*_: Any) -> None:
        calls["n"] += 1
        # Three prefills and four steps each: this is the second request's second step.
        if calls["n"] == 8:
            raise error("stop")

    handle = qwen.model.latent.merge.register_forward_hook(explode)
    with pytest.raises(error):
        decoder.generate(trio, max_new_tokens=5, min_new_tokens=5, seed=1)
    handle.remove()
    assert decoder.last_run is not None
    kept = decoder.last_run.output()
    assert kept.finish_reasons == ("length", "unfinished", "unfinished")
    assert torch.equal(kept.generation.codes[0], good.generation.codes[0])
    assert not kept.generation.completion_mask[1:].any()
    again = decoder.generate(trio, max_new_tokens=5, min_new_tokens=5, seed=1)
    assert torch.equal(again.generation.sequences, good.generation.sequences)


def test_the_models_attention_is_put_back(qwen, trio) -> None:
    before = qwen.model.decoder.config._attn_implementation
    handle = qwen.model.latent.merge.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(qwen, trio)
    handle.remove()
    assert qwen.model.decoder.config._attn_implementation == before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1, got 0"),
        ({"max_new_tokens": [1, 2]}, ValueError, r"one per request \(3\), got 2"),
        ({"num_generations": 0}, ValueError, "num_generations must be >= 1, got 0"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed must be an int or \[3\]"),
        ({"stop_strings": ["."]}, ValueError, "stop_strings need a tokenizer"),
        ({"forced_codes": 16}, ValueError, r"forced_codes must be in \[-1, 16\)"),
        ({"forced_codes": torch.zeros(3, 5)}, TypeError, "forced_codes must be integers"),
        (
            {"forced_codes": torch.zeros(2, 5).long()},
            ValueError,
            r"must be \[3, >= 5\], got \[2, 5\]",
        ),
        ({"allowed_codes": [16]}, ValueError, r"ids in \[0, 16\)"),
        ({"allowed_codes": []}, ValueError, "allowed_codes"),
        ({"allowed_codes": torch.zeros(16).bool()}, ValueError, "at least one code"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0"),
    ],
    ids=str,
)
def test_bad_options_are_named(qwen, trio, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        run(qwen, trio, **settings)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"slots": 0}, ValueError, "slots must be >= 1"),
        ({"check_every": 0}, ValueError, "check_every must be >= 1"),
        ({"prefill_prompts": 0}, ValueError, "prefill_prompts must be >= 1"),
    ],
)
def test_bad_decoders_are_refused(qwen, options, error, message) -> None:
    with pytest.raises(error, match=message):
        Decoder(qwen.model, **options)


def test_other_models_and_graphs_on_a_cpu_are_refused(qwen, trio) -> None:
    with pytest.raises(TypeError, match="must be a LatentActionModel, got Linear"):
        Decoder(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="cuda_graphs need a CUDA device"):
        Decoder(qwen.model, cuda_graphs=True).generate(trio, max_new_tokens=1)


def test_bad_prompts_are_named(qwen, trio) -> None:
    config = qwen.model.config
    with pytest.raises(ValueError, match="must have input_ids"):
        split_prompts(config, {"attention_mask": torch.ones(1, 2)})
    holes = {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.tensor([[1, 0, 1, 1]])}
    with pytest.raises(ValueError, match="one run of ones per row"):
        split_prompts(config, holes)
    empty = {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match="at least one token"):
        split_prompts(config, empty)
    twice = render(qwen.processor, TEXTS[:2], [tiny_image(0), tiny_image(1)])
    with pytest.raises(ValueError, match="cannot tell which rows of extra"):
        split_prompts(config, {**twice, "extra": torch.zeros(3, 7)})
    with pytest.raises(ValueError, match="image_grid_thw"):
        split_prompts(config, {**twice, "image_grid_thw": twice["image_grid_thw"][:1]})
    without = {k: v for k, v in trio[0].items() if k != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        run(qwen, without)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_joining_undoes_splitting(name) -> None:
    case = build(name)
    batch = render(case.processor, TEXTS, [tiny_image(i) for i in range(3)])
    prompts = split_prompts(case.model.config, batch)
    joined = join_prompts(prompts, int(batch["input_ids"][-1, 0]))
    assert joined is not None
    assert set(joined) == set(batch)
    keep = batch["attention_mask"].bool()
    for key, value in batch.items():
        mine, theirs = joined[key], value
        if key == "input_ids":
            mine, theirs = mine[keep], theirs[keep]
        assert torch.equal(mine, theirs), key


def test_images_that_do_not_stack_are_not_joined() -> None:
    case = build("idefics3")
    with_image = render(case.processor, TEXTS[:1], [tiny_image()])
    without = render(case.processor, TEXTS[1:2], [None])
    prompts = split_prompts(case.model.config, [with_image, without])
    assert join_prompts(prompts, 0) is None


def test_the_plan_counts_what_is_allocated(qwen, trio) -> None:
    decoder = Decoder(qwen.model, slots=2)
    longest = max(int(p["input_ids"].shape[1]) for p in trio)
    plan = decoder.plan(requests=3, prompt_tokens=longest, new_tokens=5, return_hidden=True)
    handle = decoder.start(trio, max_new_tokens=5, return_hidden=True)
    space, results = decoder._workspace, handle._results
    assert space is not None
    assert plan.cache_bytes + plan.tables_bytes == space.num_bytes
    assert plan.results_bytes + plan.replay_bytes == results.num_bytes
    assert plan.weights_bytes == sum(
        t.numel() * t.element_size() for t in (*qwen.model.parameters(), *qwen.model.buffers())
    )
    decoder.release()
    assert decoder._workspace is None


def test_a_plan_that_does_not_fit_says_what_to_lower() -> None:
    plan = DecodePlan(10, 3 << 30, 0, 1 << 20, 2 << 30, 0, 1)
    plan.fit(6 << 30)
    with pytest.raises(
        MemoryError,
        match=r"needs 5\.00 GiB .*1\.00 GiB are free\. Lower slots .*3\.00.*return_hidden",
    ):
        plan.fit(1 << 30)
