"""The README's code is the examples' code, and it runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
NAMES = ("train", "ops")


def block(name: str) -> str:
    return BLOCKS[NAMES.index(name)]


def execute(name: str) -> dict[str, object]:
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(compile(block(name), f"README.md:{name}", "exec"), namespace)
    return namespace


def test_every_block_is_known() -> None:
    assert len(BLOCKS) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_the_examples(name: str) -> None:
    assert block(name) == (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.slow
def test_training_example_trains_and_saves(workspace: Path) -> None:
    # A tiny model under the name that the example loads.
    shutil.move(workspace / "model", workspace / "Qwen" / "Qwen2.5-VL-3B-Instruct")
    # Their images lie in a directory of their own; the example's lie beside the rows.
    for name, given in (("conversations", "paired"), ("prompts", "prompts")):
        rows = (workspace / f"{given}.jsonl").read_text(encoding="utf-8")
        rows = rows.replace('"images": ["', '"images": ["images/')
        (workspace / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    execute("train")
    assert (workspace / "runs" / "final" / "latent_model.safetensors").is_file()


def test_ops_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    made = execute("ops")
    assert capsys.readouterr().out.startswith("tensor(")
    for name in ("x", "codebook"):
        assert getattr(made[name], "grad", None) is not None


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_paths_of_the_layout_exist() -> None:
    layout = README[README.index("## Layout") : README.index("## Status")]
    named = [p for p in re.findall(r"`([\w/.]+)`", layout) if "/" in p or p.endswith(".py")]
    assert len(named) > 10
    missing = [p for p in named if not any((r / p).exists() for r in (ROOT, ROOT / "latent_rl"))]
    assert missing == []
