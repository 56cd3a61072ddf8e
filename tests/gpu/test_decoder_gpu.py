"""The decoding engine on a CUDA device: graphs, no host sync per token, memory as planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latent_rl.decode import Decoder
from tests.models.conftest import Case, build
from tests.tiny_models import ARCHITECTURES, render, tiny_image

pytestmark = pytest.mark.gpu
STEPS = 12
SETTINGS: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "seed": 7}


def on(device: torch.device, name: str = "qwen2_5_vl", rows: int = 5) -> Case:
    case = build(name)
    case.model.to(device)
    images = [None if i % 3 == 2 else tiny_image(i) for i in range(rows)]
    inputs = render(case.processor, ["What is in the picture ?"] * rows, images)
    return case._replace(inputs={k: v.to(device) for k, v in inputs.items()})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_graphs_say_what_eager_says_and_what_generate_says(cuda, name) -> None:
    case = on(cuda, name)
    expected = case.model.generate(
        case.inputs, max_new_tokens=STEPS, seed=7, generation_kwargs={"min_new_tokens": STEPS}
    )
    for graphs in (False, True):
        out = Decoder(case.model, slots=3, cuda_graphs=graphs).generate(case.inputs, **SETTINGS)
        assert torch.equal(out.generation.codes, expected.codes)
        assert torch.equal(out.generation.completion_ids, expected.completion_ids)


def test_an_update_is_seen_without_a_new_graph(cuda) -> None:
    case = on(cuda)
    decoder = Decoder(case.model)
    before = decoder.generate(case.inputs, **SETTINGS).generation
    assert decoder._workspace is not None
    graphs = decoder._workspace._graphs
    assert graphs is not None
    captured = dict(graphs._graphs)
    with torch.no_grad():
        case.model.latent.policy.head.weight.neg_()
    after = decoder.generate(case.inputs, **SETTINGS).generation
    assert not torch.equal(before.codes, after.codes)
    assert captured
    assert all(graphs._graphs[key] is graph for key, graph in captured.items())
    fresh = Decoder(case.model, cuda_graphs=False).generate(case.inputs, **SETTINGS).generation
    assert torch.equal(fresh.codes, after.codes)


def test_an_update_is_seen_under_autocast(cuda) -> None:
    case = on(cuda)
    decoder = Decoder(case.model)

    def codes(given: Decoder) -> torch.Tensor:
        # Every rollout of a trainer has an autocast of its own.
        with torch.autocast("cuda", torch.bfloat16):
            return given.generate(case.inputs, **SETTINGS).generation.codes

    before = codes(decoder)
    with torch.no_grad():
        for layer in case.model.latent.policy.tower.layers:
            layer.self_attn.o_proj.weight.neg_().mul_(8)
            layer.mlp.down_proj.weight.neg_().mul_(8)
    # What the first rollout's copies of the weights held is somebody else's by now.
    taken = [torch.full((1 << 20,), torch.nan, device=cuda) for _ in range(64)]
    after = codes(decoder)
    del taken
    assert not torch.equal(before, after)
    assert torch.equal(after, codes(Decoder(case.model, cuda_graphs=False)))


def test_memory_stays_within_five_per_cent_of_the_plan(cuda) -> None:
    case = on(cuda, rows=4)
    decoder = Decoder(case.model, slots=64, cuda_graphs=False)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(cuda)
    run = decoder.start(
        case.inputs, max_new_tokens=4096, num_generations=16, return_hidden=True, seed=1
    )
    held = torch.cuda.memory_allocated(cuda) - before
    longest = int(case.inputs["input_ids"].shape[1])
    plan = decoder.plan(requests=64, prompt_tokens=longest, new_tokens=4096, return_hidden=True)
    assert abs(held - plan.new_bytes) <= 0.05 * plan.new_bytes
    del run


def test_no_synchronisation_between_looks(cuda) -> None:
    case = on(cuda)
    decoder = Decoder(case.model, check_every=STEPS)
    decoder.generate(case.inputs, **SETTINGS)
    run = decoder.start(case.inputs, **SETTINGS)
    run._streams = False
    pieces = iter(run)
    space = decoder._workspace
    assert space is not None
    advance = space.advance

    def strict(*args: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    space.advance = strict  # type: ignore[method-assign]
    for _ in pieces:
        pass
    assert run.output().generation.completion_mask.all()
