"""Collators on real processors: what is a response, what is padded, which tokens align."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latent_rl.data import (
    IGNORE_INDEX,
    ConversationCollator,
    PairedViewCollator,
    collators,
    conversation_of,
    render_prompts,
)
from tests.tiny_models import tiny_image, tiny_vlm

ARCHITECTURES = ("qwen2_5_vl", "llava", "idefics3", "gemma3")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def vlm(request: pytest.FixtureRequest) -> Any:
    return tiny_vlm(request.param)


@pytest.fixture(scope="module")
def qwen() -> Any:
    return tiny_vlm("qwen2_5_vl")


def row(question: str, answer: str, *images: Any) -> dict[str, Any]:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "images": list(images)}


def mixed_rows() -> list[dict[str, Any]]:
    return [
        row("What is in the picture ?", "A red house .", tiny_image(1)),
        row("How many birds ?", "two", tiny_image(2), tiny_image(3)),
        row("Hello", "A green tree . A blue boat"),
    ]


def decoded(processor: Any, ids: torch.Tensor) -> str:
    text: str = processor.tokenizer.decode(ids)
    return text


def test_rows_with_one_several_and_no_images_mix(vlm: Any) -> None:
    rows = mixed_rows()
    batch = ConversationCollator(vlm.processor)(rows)
    with torch.no_grad():
        logits = vlm.model(**batch["inputs"]).logits
    assert logits.shape[:2] == batch["labels"].shape
    assert torch.isfinite(logits[batch["inputs"]["attention_mask"].bool()]).all()


def test_a_row_reads_the_same_alone_and_in_a_batch(vlm: Any) -> None:
    rows = mixed_rows()
    collator = ConversationCollator(vlm.processor)
    batch = collator(rows)
    for i, one in enumerate(rows):
        alone = collator([one])
        length = alone["labels"].shape[1]
        assert torch.equal(batch["labels"][i, :length], alone["labels"][0])
        with torch.no_grad():
            expected = vlm.model(**alone["inputs"]).logits[0]
            given = vlm.model(**batch["inputs"]).logits[i, :length]
        # Other batch shapes sum in another order.
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)


def test_labels_are_the_answer_and_its_end(vlm: Any) -> None:
    rows = mixed_rows()
    batch = ConversationCollator(vlm.processor)(rows)
    end = vlm.processor.tokenizer.eos_token
    for i, one in enumerate(rows):
        kept = batch["labels"][i] != IGNORE_INDEX
        answer = one["messages"][1]["content"]
        assert decoded(vlm.processor, batch["labels"][i][kept]) == answer + end
        assert torch.equal(batch["labels"][i][kept], batch["inputs"]["input_ids"][i][kept])


def test_no_pad_or_image_token_is_a_label(vlm: Any) -> None:
    batch = ConversationCollator(vlm.processor)(mixed_rows())
    labelled = batch["labels"] != IGNORE_INDEX
    assert batch["inputs"]["attention_mask"][labelled].all()
    assert not (batch["inputs"]["input_ids"][labelled] == vlm.model.config.image_token_id).any()


def test_every_turn_of_the_assistant_is_a_response(qwen: Any) -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    batch = ConversationCollator(qwen.processor)([{"messages": turns}])
    kept = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
    assert decoded(qwen.processor, kept) == "two<|end|>four<|end|>"


def test_response_tokens_continue_the_rendered_prompt(qwen: Any) -> None:
    """What is learnt is exactly what a rollout on the same prompt would have to emit."""
    (one,) = mixed_rows()[:1]
    batch = ConversationCollator(qwen.processor)([one])
    prompt = {"prompt": one["messages"][:1], "images": one["images"]}
    ids = render_prompts(qwen.processor, [prompt])["input_ids"][0]
    first = int((batch["labels"][0] != IGNORE_INDEX).nonzero()[0])
    assert torch.equal(batch["inputs"]["input_ids"][0, :first], ids)


def test_prompts_are_padded_on_the_left(vlm: Any) -> None:
    rows = [{"prompt": one["messages"][:1], "images": one["images"]} for one in mixed_rows()]
    inputs = render_prompts(vlm.processor, rows)
    mask = inputs["attention_mask"]
    assert mask[:, -1].all()
    assert (mask.diff(dim=1) >= 0).all()
    assert not mask.all()
    with torch.no_grad():
        out = vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out.shape[0] == 3


def test_text_view_has_no_placeholder_and_aligned_tokens(vlm: Any) -> None:
    batch = PairedViewCollator(vlm.processor)(mixed_rows())
    view, ids = batch["text_view"], batch["inputs"]["input_ids"]
    assert view["rows"].tolist() == [0, 1]
    assert not (view["inputs"]["input_ids"] == vlm.model.config.image_token_id).any()
    assert "pixel_values" not in view["inputs"]
    for p, i in enumerate(view["rows"].tolist()):
        kept = view["keep_mask"][p]
        image_positions = view["image_positions"][p][kept]
        text_positions = view["text_positions"][p][kept]
        assert torch.equal(ids[i, image_positions], view["inputs"]["input_ids"][p, text_positions])
        assert (image_positions.diff() > 0).all()
        assert (text_positions.diff() > 0).all()
        # Every token of the answer is seen in both views.
        answer = set((batch["labels"][i] != IGNORE_INDEX).nonzero()[:, 0].tolist())
        assert answer <= set(image_positions.tolist())
        assert not (ids[i, image_positions] == vlm.model.config.image_token_id).any()


def test_paired_views_of_a_batch_without_images(qwen: Any) -> None:
    batch = PairedViewCollator(qwen.processor)([row("Hello", "A tree")])
    assert batch["text_view"]["rows"].shape == (0,)
    assert batch["text_view"]["keep_mask"].shape == (0, 0)


def test_max_length_cuts_text_but_never_an_image(qwen: Any) -> None:
    long = row("What ?", "one two three four five six seven eight", tiny_image())
    full = ConversationCollator(qwen.processor)([long])["labels"].shape[1]
    cut = ConversationCollator(qwen.processor, max_length=full - 3)([long])
    assert cut["labels"].shape[1] == full - 3
    with pytest.raises(ValueError, match=r"row 0.*would cut image tokens"):
        ConversationCollator(qwen.processor, max_length=4)([long])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"text": "x"}, r"row 1: column 'messages' must be .*columns are \['text'\]"),
        ({"messages": [{"role": "bird", "content": "x"}]}, "row 1.*role must be one of"),
        ({"messages": [{"role": "user", "content": "x"}]}, "row 1.*no assistant turn"),
        (
            {**row("Hi", "two", tiny_image()), "images": []},
            "row 1: 1 image parts in 'messages' but 0 images",
        ),
    ],
)
def test_bad_rows_are_named(qwen: Any, broken: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConversationCollator(qwen.processor)([row("Hello", "A tree"), broken])


def test_a_missing_picture_is_named(qwen: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        ConversationCollator(qwen.processor)([row("Hi", "two", "gone.png")])


def test_an_unmarked_image_goes_before_the_first_user_text() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    normal, _ = conversation_of({"messages": messages, "images": [tiny_image()]})
    assert [part["type"] for part in normal[1]["content"]] == ["image", "text"]
    assert [part["type"] for part in normal[0]["content"]] == ["text"]


def test_pad_of_encoded_rows_equals_the_collator(qwen: Any) -> None:
    collator = ConversationCollator(qwen.processor)
    rows = mixed_rows()
    whole, padded = collator(rows), collator.pad(collator.encode(rows))
    assert torch.equal(whole["labels"], padded["labels"])
    for name, value in whole["inputs"].items():
        assert torch.equal(value, padded["inputs"][name])


def test_repeated_prompts_are_encoded_once(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"one {i} ?", "images": [tiny_image(i)]} for i in range(2)]
    repeated = [rows[0], rows[0], rows[1], rows[0]]
    copies = [dict(row) for row in repeated]
    calls: list[str] = []
    encode = collators.encode_prompt
    monkeypatch.setattr(
        collators, "encode_prompt", lambda *args: calls.append(args[2]) or encode(*args)
    )
    inputs = render_prompts(qwen.processor, repeated)
    assert calls == ["row 0", "row 2"]
    for name, value in render_prompts(qwen.processor, copies).items():
        assert torch.equal(inputs[name], value), name
