"""`latent-rl train`: the whole chain, its hand-overs, and what bad input does."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from latent_rl.cli import run
from latent_rl.train.run_lock import run_lock
from tests.train.kill_runs import KILLED, Runs

STEPS = [
    "01-inverse_warmup",
    "02-projector_warmup",
    "03-joint",
    "04-behaviour_cloning",
    "05-task_sft",
    "06-rl",
]

# Counts its calls in a file and interrupts the second one, as Ctrl-C in a rollout would.
INTERRUPTING_REWARD = """
from pathlib import Path

def interrupting(*, completions, **columns):
    calls = Path("calls")
    count = int(calls.read_text()) + 1 if calls.exists() else 1
    calls.write_text(str(count))
    if count == 2:
        raise KeyboardInterrupt
    return [float(len(str(text))) for text in completions]
"""


def weights(step: Path) -> dict[str, torch.Tensor]:
    return load_file(step / "latent_model.safetensors")


def edit(path: Path, change: Any) -> None:
    """Apply a change to the recipe's mapping, in place."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(recipe)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def files(place: Path) -> set[str]:
    """Everything below a directory except what importing a module leaves."""
    found = (p for p in place.rglob("*") if "__pycache__" not in p.parts)
    return {str(p.relative_to(place)) for p in found}


class TestChain:
    def test_every_step_is_written_and_nothing_unfinished_stays(self, trained: Path) -> None:
        assert sorted(p.name for p in (trained / "run").iterdir()) == STEPS

    def test_every_step_logged_its_loss(self, trained: Path) -> None:
        for step in STEPS:
            log = json.loads((trained / "run" / step / "log.json").read_text(encoding="utf-8"))
            assert any("loss" in entry for entry in log), step

    @pytest.mark.parametrize(
        ("before", "after", "moved"),
        [
            ("01-inverse_warmup", "02-projector_warmup", "projector."),
            ("03-joint", "04-behaviour_cloning", "policy."),
        ],
    )
    def test_a_step_starts_from_the_one_before_and_moves_its_own_part(
        self, trained: Path, before: str, after: str, moved: str
    ) -> None:
        old, new = weights(trained / "run" / before), weights(trained / "run" / after)
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert changed
        assert all(name.startswith(moved) for name in changed), sorted(changed)[:5]

    def test_the_tuned_backbone_travels_with_the_later_steps(self, trained: Path) -> None:
        base = load_file(trained / "model" / "model.safetensors")
        assert not (trained / "run" / STEPS[3] / "backbone").exists()
        tuned = [
            load_file(trained / "run" / step / "backbone" / "model.safetensors")
            for step in STEPS[4:]
        ]
        assert any(not torch.equal(base[name], tuned[0][name]) for name in base)
        assert all(torch.equal(tuned[0][name], tuned[1][name]) for name in base)

    def test_a_finished_run_is_left_alone(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(trained)
        before = {p: p.stat().st_mtime_ns for p in (trained / "run").rglob("*")}
        assert run(["train", "recipe.yaml"]) == 0
        assert "all done" in capsys.readouterr().out
        assert {p: p.stat().st_mtime_ns for p in (trained / "run").rglob("*")} == before


class TestParts:
    def test_one_stage_of_a_recipe(self, workspace: Path) -> None:
        assert run(["train", "recipe.yaml", "--stage", "inverse-warmup", "--out", "other"]) == 0
        assert [p.name for p in (workspace / "other").iterdir()] == STEPS[:1]

    def test_a_later_stage_starts_from_the_last_finished_one(
        self, workspace: Path, trained: Path
    ) -> None:
        shutil.copytree(trained / "run" / STEPS[0], workspace / "run" / STEPS[0])
        assert run(["train", "recipe.yaml", "--stage", "behaviour_cloning"]) == 0
        first, cloned = (weights(workspace / "run" / step) for step in (STEPS[0], STEPS[3]))
        assert torch.equal(first["quantizer.codebook.weight"], cloned["quantizer.codebook.weight"])

    def test_a_dry_run_writes_nothing(
        self, workspace: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = files(workspace)
        assert run(["train", "recipe.yaml", "--dry-run"]) == 0
        assert files(workspace) == before
        out = capsys.readouterr().out
        assert all(step in out for step in STEPS)

    def test_a_run_starts_from_a_checkpoint(self, workspace: Path, trained: Path) -> None:
        def change(recipe: dict[str, Any]) -> None:
            recipe["model"] = {"checkpoint": str(trained / "run" / STEPS[3])}
            del recipe["stages"]

        edit(workspace / "recipe.yaml", change)
        assert run(["train", "recipe.yaml"]) == 0
        assert [p.name for p in (workspace / "run").iterdir()] == ["01-rl"]

    def test_a_recipe_names_any_algorithm_and_its_settings(
        self, workspace: Path, trained: Path
    ) -> None:
        def change(recipe: dict[str, Any]) -> None:
            recipe["model"] = {"checkpoint": str(trained / "run" / STEPS[3])}
            recipe["rl"]["algorithm"] = "ppo"
            recipe["rl"]["arguments"] |= {
                "vf_coef": 0.5,
                "target_kl": 0.01,
                "entropy_coef": 0.01,
                "entropy_schedule": "cosine",
                "reward_clip_range": [-1.0, 1.0],
            }
            del recipe["stages"]

        edit(workspace / "recipe.yaml", change)
        assert run(["train", "recipe.yaml"]) == 0
        logs = (workspace / "run" / "01-rl" / "log.json").read_text(encoding="utf-8")
        assert "loss/value_avg" in logs
        assert "entropy_coef" in logs

    def test_an_interrupted_step_continues_where_it_was(
        self, workspace: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (workspace / "interrupting_reward.py").write_text(INTERRUPTING_REWARD, encoding="utf-8")

        def change(recipe: dict[str, Any]) -> None:
            recipe["model"] = {"checkpoint": str(trained / "run" / STEPS[3])}
            recipe["rl"]["rewards"] = [{"function": "interrupting_reward:interrupting"}]
            del recipe["stages"]

        edit(workspace / "recipe.yaml", change)
        assert run(["train", "recipe.yaml"]) == 130
        assert "interrupted" in capsys.readouterr().err
        assert not (workspace / "run" / "01-rl").exists()
        assert run(["train", "recipe.yaml"]) == 0
        assert [p.name for p in (workspace / "run").iterdir()] == ["01-rl"]
        # Step 1 was not repeated: one call before, the interrupted one, and one after.
        assert (workspace / "calls").read_text(encoding="utf-8") == "3"


class TestBaseline:
    """`rl.baseline`: the token-level arm beside RL of codes."""

    @pytest.fixture
    def both(self, workspace: Path, trained: Path) -> Path:
        """A recipe of both arms, from the cloned policy."""
        pytest.importorskip("trl", reason="the token-level baseline is TRL's trainer")

        def change(recipe: dict[str, Any]) -> None:
            recipe["model"] = {"checkpoint": str(trained / "run" / STEPS[3])}
            recipe["rl"]["baseline"] = {"arguments": {"learning_rate": 1e-3}}
            del recipe["stages"]

        edit(workspace / "recipe.yaml", change)
        return workspace

    def test_both_arms_start_from_the_same_checkpoint_on_one_budget(
        self, both: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert run(["train", "recipe.yaml", "--stage", "rl"]) == 0
        before = (both / "run/01-rl/log.json").stat().st_mtime_ns
        # A baseline that comes later leaves RL alone.
        assert run(["train", "recipe.yaml"]) == 0
        assert sorted(p.name for p in (both / "run").iterdir()) == ["01-baseline", "01-rl"]
        assert (both / "run/01-rl/log.json").stat().st_mtime_ns == before
        spent = []
        for step in ("01-rl", "01-baseline"):
            log = json.loads((both / "run" / step / "log.json").read_text(encoding="utf-8"))
            last = log[-1]
            spent.append((last["spent/completions"], last["spent/optimizer_steps"]))
            assert last["spent/generated_tokens"] > 0
        assert spent == [(4, 2), (4, 2)]
        # The baseline is a plain model, tuned from the base model.
        assert not (both / "run/01-baseline/latent_config.json").exists()
        base = load_file(trained / "model" / "model.safetensors")
        tuned = load_file(both / "run/01-baseline/model.safetensors")
        assert tuned.keys() == base.keys()
        assert any(not torch.equal(base[name], tuned[name]) for name in base)

    def test_the_token_arm_can_be_run_alone(self, both: Path) -> None:
        assert run(["train", "recipe.yaml", "--stage", "baseline"]) == 0
        assert [p.name for p in (both / "run").iterdir()] == ["01-baseline"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"dynamic_sampling": True}, "TRL has no dynamic sampling"),
            ({"loss_type": "bnpo"}, "rl.baseline.arguments.loss_type: is set by rl.algorithm"),
            ({"learning_rat": 1.0}, "did you mean 'learning_rate'?"),
        ],
    )
    def test_what_cannot_be_is_said_before_anything_is_trained(
        self, both: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str
    ) -> None:
        edit(both / "recipe.yaml", _set("rl", "baseline", "arguments", value=arguments))
        assert run(["train", "recipe.yaml"]) == 2
        assert message in capsys.readouterr().err
        assert not (both / "run").exists()

    def test_without_trl_one_line_says_so(
        self, both: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "trl", None)
        assert run(["train", "recipe.yaml"]) == 2
        error = capsys.readouterr().err.strip()
        assert "pip install 'latent-rl[trl]'" in error
        assert "\n" not in error
        assert not (both / "run").exists()


# One after the other: where in the chain a run dies.
KILLS = [
    ("torch:Tensor.backward", 2, "before"),  # an update of the first stage
    ("latent_rl.train.base_trainer:mark_complete", 4, "before"),  # a checkpoint of the third
    ("latent_rl.cli.run_dir:RunDirectory.finish", 3, "before"),  # the tuned backbone is written
    ("pathlib:Path.rename", 1, "after"),  # and in place, the work beside it
    ("torch:Tensor.backward", 2, "before"),  # an update of the RL step
]


@pytest.mark.slow  # six processes
def test_a_chain_killed_again_and_again_gives_the_same_models(
    workspace: Path, trained: Path, tmp_path: Path
) -> None:
    runs = Runs(tmp_path)
    for point in KILLS:
        status, _ = runs.ask("cli", workspace, arguments=["train", "recipe.yaml"], point=point)
        assert status == KILLED, runs.errors.read_text()[-2000:]
    runs.finish("cli", workspace, arguments=["train", "recipe.yaml"])
    runs.close()
    assert sorted(p.name for p in (workspace / "run").iterdir()) == STEPS
    for step in STEPS:
        ours, theirs = weights(workspace / "run" / step), weights(trained / "run" / step)
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == [], step


def test_a_second_run_in_the_same_directory_is_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(workspace / "run", ready, end))
    other.start()
    assert ready.wait(60)
    assert run(["train", "recipe.yaml"]) == 2
    end.set()
    other.join()
    assert "run is in use by another run" in capsys.readouterr().err
    assert not (workspace / "run").exists()


def _hold(place: Path, ready: Any, end: Any) -> None:
    with run_lock(place):
        ready.set()
        end.wait(60)
    place.rmdir()


def test_a_diverged_step_is_one_line_and_keeps_its_batch(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(workspace / "recipe.yaml", _set("arguments", "max_loss", value=1e-9))
    assert run(["train", "recipe.yaml"]) == 2
    assert "update 1 was not made: the loss has the size" in capsys.readouterr().err
    assert (workspace / "run" / ".01-inverse_warmup.partial" / "bad_batch-1.json").is_file()


def test_logged_completions_outlive_the_work(workspace: Path, trained: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        recipe["model"] = {"checkpoint": str(trained / "run" / STEPS[3])}
        recipe["rl"]["arguments"] |= {"log_completions": True}
        del recipe["stages"]

    edit(workspace / "recipe.yaml", change)
    assert run(["train", "recipe.yaml"]) == 0
    logged = sorted(p.name for p in (workspace / "run" / "01-rl" / "completions").iterdir())
    assert logged == ["completions_000000.jsonl", "completions_000001.jsonl"]


def _set(*path: Any, value: Any) -> Any:
    def change(recipe: dict[str, Any]) -> None:
        at: Any = recipe
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


BAD_RECIPES = {
    "unknown stage": (
        _set("stages", 0, "stage", value="inverse_warmpu"),
        "stages[0].stage: unknown stage 'inverse_warmpu'; did you mean 'inverse_warmup'?",
    ),
    "unknown setting": (
        _set("stages", 0, "settings", value={"kmeans": 3}),
        "stages[0].settings: unknown key 'kmeans'",
    ),
    "setting of the wrong type": (
        _set("stages", 0, "settings", value={"entropy_weight": "much"}),
        "stages[0].settings.entropy_weight: expected a number, got 'much'",
    ),
    "unknown argument": (
        _set("arguments", "max_step", value=3),
        "arguments: unknown key 'max_step'; did you mean 'max_steps'?",
    ),
    "reserved argument": (
        _set("rl", "arguments", "output_dir", value="x"),
        "rl.arguments.output_dir: is set by the run",
    ),
    "impossible argument": (
        _set("rl", "arguments", "num_generations", value=1),
        "num_generations must be >= 2",
    ),
    "group does not fit the batch": (
        _set("rl", "arguments", "num_generations", value=3),
        "must be a multiple of num_generations (3)",
    ),
    "unknown algorithm": (
        _set("rl", "algorithm", value="grop"),
        "rl.algorithm: unknown algorithm 'grop'; did you mean 'grpo'?",
    ),
    "setting of another algorithm": (
        _set("rl", "arguments", "gamma", value=0.9),
        "gamma means nothing to loss_type 'grpo', got 0.9",
    ),
    "unknown schedule": (
        _set("rl", "arguments", "entropy_schedule", value="linaer"),
        "entropy_schedule must be one of ['constant', 'cosine', 'linear'], got 'linaer'",
    ),
    "unknown reward": (
        _set("rl", "rewards", 1, "function", value="wellformed"),
        "rl.rewards[1].function: unknown reward 'wellformed'; did you mean 'well_formed'?",
    ),
    "bad reward setting": (
        _set("rl", "rewards", 1, "settings", value={"max_words": 0}),
        "rl.rewards[1].settings: WellFormed: need 1 <= min_words",
    ),
    "reward module missing": (
        _set("rl", "rewards", 1, "function", value="no_such_module:reward"),
        "rl.rewards[1].function: cannot import 'no_such_module'",
    ),
    "reward function missing": (
        _set("rl", "rewards", 1, "function", value="json:reward"),
        "rl.rewards[1].function: module 'json' has no function 'reward'",
    ),
    "unknown format": (
        _set("data", "paired", "format", value="chatt"),
        "data.paired: unknown format 'chatt'; did you mean 'chat'?",
    ),
    "missing data": (
        _set("data", "paired", "path", value="absent.jsonl"),
        "data.paired: no such file: absent.jsonl",
    ),
    "missing images": (
        _set("data", "paired", "image_root", value="elsewhere"),
        "data.paired: paired.jsonl, row 0: image is missing: elsewhere/0.png",
    ),
    "wrong column for a stage": (
        _set("data", "paired", "path", value="prompts.jsonl"),
        "data.paired: prompts.jsonl, row 0: column 'messages'",
    ),
    "wrong column for rl": (
        _set("data", "prompts", "path", value="paired.jsonl"),
        "data.prompts: paired.jsonl, row 0: column 'prompt'",
    ),
    "missing model": (
        _set("model", "backbone", value="./absent"),
        "model.backbone: ./absent: no such directory",
    ),
    "directory without a model": (
        _set("model", "backbone", value="./images"),
        "model.backbone: ./images: has no config.json",
    ),
    "unknown latent field": (
        _set("model", "latent", value={"codes": 8}),
        "LatentConfig: unknown field(s) codes",
    ),
    "impossible latent field": (
        _set("model", "latent", value={"num_codes": 0}),
        "LatentConfig: num_codes must be >= 1, got 0",
    ),
}


class TestBadInput:
    @pytest.mark.parametrize("case", BAD_RECIPES)
    def test_one_line_exit_code_two_and_nothing_written(
        self, workspace: Path, capsys: pytest.CaptureFixture[str], case: str
    ) -> None:
        change, message = BAD_RECIPES[case]
        edit(workspace / "recipe.yaml", change)
        before = files(workspace)
        assert run(["train", "recipe.yaml"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert files(workspace) == before

    def test_codebook_size_that_differs_from_the_checkpoint(
        self, workspace: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = {"checkpoint": str(trained / "run"), "latent": {"num_codes": 16}}
        edit(workspace / "recipe.yaml", _set("model", value=model))
        assert run(["train", "recipe.yaml"]) == 2
        assert "num_codes is 16, but the checkpoint has 8" in capsys.readouterr().err

    def test_corrupt_checkpoint(
        self, workspace: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        broken = workspace / "broken"
        shutil.copytree(trained / "run" / STEPS[3], broken)
        data = (broken / "latent_model.safetensors").read_bytes()
        (broken / "latent_model.safetensors").write_bytes(data[: len(data) // 2])
        edit(workspace / "recipe.yaml", _set("model", value={"checkpoint": "broken"}))
        before = files(workspace)
        assert run(["train", "recipe.yaml"]) == 2
        error = capsys.readouterr().err
        assert "is corrupt" in error
        assert error.count("\n") == 1
        assert files(workspace) == before

    def test_changed_recipe_is_not_mixed_with_a_finished_run(
        self, workspace: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(trained / "run", workspace / "run")
        edit(workspace / "recipe.yaml", _set("seed", value=1))
        assert run(["train", "recipe.yaml"]) == 2
        assert "was made with other settings" in capsys.readouterr().err
        assert run(["train", "recipe.yaml", "--no-resume", "--stage", STEPS[0]]) == 2

    def test_changed_data_are_not_mixed_with_a_finished_run(
        self, workspace: Path, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(trained / "run", workspace / "run")
        assert run(["train", "recipe.yaml", "--dry-run"]) == 0
        rows = (workspace / "paired.jsonl").read_text(encoding="utf-8")
        (workspace / "paired.jsonl").write_text(rows.replace("house", "boat"), encoding="utf-8")
        assert run(["train", "recipe.yaml", "--dry-run"]) == 2
        assert "was made with other settings or other data" in capsys.readouterr().err

    def test_bf16_recipes_are_checked_and_run_without_an_accelerator(self, workspace: Path) -> None:
        edit(workspace / "recipe.yaml", lambda r: r["arguments"].update(bf16=True))
        assert run(["train", "recipe.yaml", "--dry-run"]) == 0

    def test_no_resume_replaces_a_run(self, workspace: Path, trained: Path) -> None:
        shutil.copytree(trained / "run" / STEPS[0], workspace / "run" / STEPS[0])
        edit(workspace / "recipe.yaml", _set("seed", value=1))
        edit(workspace / "recipe.yaml", lambda r: r.update(stages=r["stages"][:1], rl=None))
        assert run(["train", "recipe.yaml", "--no-resume"]) == 0
        old, new = weights(trained / "run" / STEPS[0]), weights(workspace / "run" / STEPS[0])
        assert not torch.equal(old["quantizer.codebook.weight"], new["quantizer.codebook.weight"])

    def test_unknown_stage_option(
        self, workspace: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["train", "recipe.yaml", "--stage", "jiont"]) == 2
        assert "the recipe has no stage 'jiont'; did you mean 'joint'?" in capsys.readouterr().err

    def test_failure_inside_training_leaves_nothing(
        self, workspace: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (workspace / "images" / "0.png").write_bytes(b"no image")
        before = files(workspace)
        assert run(["train", "recipe.yaml"]) == 2
        assert "0.png cannot be decoded" in capsys.readouterr().err
        assert files(workspace) == before
