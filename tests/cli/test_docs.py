"""The Python in docs/ runs as it stands, on tiny stand-ins for models, data and the network."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from latent_rl import train
from latent_rl.data import render_prompts
from latent_rl.models import LatentActionModel, LatentConfig
from tests.data import fixtures as fx
from tests.tiny_models import tiny_image, tiny_vlm
from tests.train.tiny_world import conversation

ROOT = Path(__file__).resolve().parents[2]
# Not to be run: a signature without its class.
FRAGMENTS = ("def answer(self, rows, seeds, sampling)",)
SHORT = {
    "max_steps": 1,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
}
ONE_GROUP = {"max_completion_length": 3, "num_generations": 8}


def blocks(page: Path) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in found if not block.startswith(FRAGMENTS)]


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if blocks(page)]


class Words:
    """In the place of a sentence encoder of 90 MB."""

    name = "words"

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[1.0 + text.count(letter) for letter in "aeiou "] for text in texts])


def tiny_latent() -> tuple[LatentActionModel, Any]:
    vlm = tiny_vlm("llava")
    config = LatentConfig(num_codes=32, inverse_layers=1, policy_layers=1, merge_blocks=1)
    return LatentActionModel(vlm.model, config), vlm.processor


def names_the_digit(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    return [float(len(c[0]["content"]) % 3) for c, _ in zip(completions, answer, strict=True)]


def namespace() -> dict[str, Any]:
    """What a reader of the docs has at hand."""
    model, processor = tiny_latent()
    prompts = [
        {
            "prompt": [{"role": "user", "content": "How many birds are there ?"}],
            "images": [tiny_image(index)],
            "answer": "two",
            "colour": "red",
        }
        for index in range(8)
    ]
    inputs = render_prompts(processor, prompts[:2])
    return {
        "__name__": "__main__",
        "torch": torch,
        "model": model,
        "processor": processor,
        "inputs": inputs,
        "mask": inputs["attention_mask"].bool(),
        "names_the_digit": names_the_digit,
        "test_rows": prompts[:1],
        "ood_rows": prompts[1:2],
        "prompts": prompts,
    }


def shortened(make: Callable[..., Any], **forced: Any) -> Callable[..., Any]:
    @functools.wraps(make, updated=())
    def made(*args: Any, **given: Any) -> Any:
        return make(*args, **{**given, **forced})

    return made


def rows_of(page: str, number: int, prompts: list[dict[str, Any]]) -> Any:
    """What `rows` means in a block."""
    if page == "codebooks":
        return torch.randn(64, 64)
    if page == "training" and number < 2:
        return [conversation(index, image=index % 2 == 0) for index in range(8)]
    return prompts


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A directory with the files that the docs name; short runs, tiny models under the names of
    large ones, nothing from the network."""
    from latent_rl import eval as evaluation
    from latent_rl import rewards

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_API_KEY", "none")
    for name in ("StageArguments", "LatentGRPOConfig"):
        monkeypatch.setattr(train, name, shortened(getattr(train, name), **SHORT))
    given = train.LatentGRPOConfig
    monkeypatch.setattr(train, "LatentGRPOConfig", shortened(given, **ONE_GROUP))
    grid = {"learning_rates": [1e-4], "seeds": [0]}
    monkeypatch.setattr(train, "sweep", shortened(train.sweep, **grid))
    monkeypatch.setattr(evaluation, "load_encoder", Words)
    tiny = staticmethod(lambda *args, **options: tiny_vlm("llava").model)
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", tiny)
    model = staticmethod(
        lambda *args, **options: lambda completions, **columns: [0.0] * len(completions)
    )
    monkeypatch.setattr(rewards.RewardModel, "from_pretrained", model)
    write_files(tmp_path)
    known = set(train.ALGORITHMS)
    yield
    for name in set(train.ALGORITHMS) - known:
        del train.ALGORITHMS[name]


def write_files(place: Path) -> None:
    (place / "images").mkdir()
    (place / "runs" / "mine").mkdir(parents=True)
    for folder in (place, place / "images"):
        image = fx.write_image(folder)
    records = {"MM_pretrain": fx.paper, "mmrole": fx.mmrole, "pcogalign": fx.pcogalign}
    for name, record in records.items():
        (place / f"{name}.json").write_text(json.dumps([record(image)]), encoding="utf-8")
    text = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    (place / "conversations.jsonl").write_text(json.dumps(text), encoding="utf-8")
    tiny_latent()[0].save_pretrained(place / "runs" / "cloned", include_backbone=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.usefixtures("place")
def test_the_code_of_a_page_runs(page: Path) -> None:
    names = namespace()
    # Looked up here, where it makes short runs.
    names["args"] = train.LatentGRPOConfig(output_dir="runs/rl")
    for number, block in enumerate(blocks(page)):
        names["rows"] = rows_of(page.stem, number, names["prompts"])
        exec(compile(block, f"{page.name}:{number}", "exec"), names)
