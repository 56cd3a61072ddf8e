"""What arrives in a tracker, and the completions of a run as tables."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch

from latent_rl.train import InverseWarmup, StageTrainer
from latent_rl.train.completions_log import MAX_CHARACTERS, CompletionsLog, table_writers
from latent_rl.train.rollout_record import RolloutRecord, prompt_text
from tests.train.test_rl_trainer import config, even_tokens, make
from tests.train.test_stage_trainer import StopAt, arguments
from tests.train.tiny_world import tiny_world


def second(completions, answer, **columns):
    """Does not apply to odd prompts."""
    return [None if a % 2 else 2.0 for a in answer]


LOGGED = {
    "max_steps": 4,
    "num_iterations": 2,
    "log_completions": True,
    "num_completions_to_print": 1,
}
REWARDS = {
    "train/reward",
    "train/reward_std",
    "train/rewards/even_tokens/mean",
    "train/rewards/second/mean",
    "train/rewards/second/std",
    "train/completions/mean_length",
    "train/clip_ratio/low_mean",
    "train/kl",
    "train/loss",
    "train/grad_norm",
}


def events_of(directory):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard reads its event files",
    )
    events = accumulator.EventAccumulator(str(directory))
    events.Reload()
    return events


def test_tensorboard_gets_every_metric_and_the_completions(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the tracker under test")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer, _ = make(
        tmp_path,
        [even_tokens, second],
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=4,
        **LOGGED,
    )
    trainer.train()
    events = events_of(tmp_path / "events")
    tags = set(events.Tags()["scalars"])
    assert tags >= REWARDS | {"eval/reward", "eval/rewards/even_tokens/mean"}
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    logged = [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
    assert losses == [(step, pytest.approx(value)) for step, value in logged]
    rewards = events.Scalars("train/rewards/second/mean")
    assert {event.value for event in rewards} == {2.0}
    tables = events.Tensors("completions/text_summary")
    assert [table.step for table in tables] == [0, 2]  # the updates before each rollout
    text = tables[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| rollout | step | prompt | completion | codes | reward |")
    assert text.count("\n") == 1 + 16


def test_a_stage_s_metrics_reach_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the tracker under test")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    world = tiny_world()
    StageTrainer(
        world.model,
        InverseWarmup(1e-3),
        arguments(tmp_path, max_steps=2, logging_steps=1, report_to="tensorboard"),
        world.rows,
        processing_class=world.processor,
    ).train()
    tags = set(events_of(tmp_path / "events").Tags()["scalars"])
    assert tags >= {"train/ce", "train/base_ce", "train/random_ce", "train/code_perplexity"}


def test_trackio_gets_every_metric_and_the_completions(tmp_path, monkeypatch):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed (it asks for an older pillow)")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    trainer, _ = make(
        tmp_path,
        [even_tokens, second],
        report_to="trackio",
        project="latent",
        run_name="one",
        **LOGGED,
    )
    trainer.train()
    logs = SQLiteStorage.get_logs("latent", "one")
    assert {name for entry in logs for name in entry} >= REWARDS | {"completions"}
    assert {e["train/rewards/second/mean"] for e in logs if "train/rewards/second/mean" in e} == {2}
    tables = [entry["completions"]["_value"] for entry in logs if "completions" in entry]
    assert [len(table) for table in tables] == [16, 16]
    assert tables[0][0]["prompt"].startswith("user: ")


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_rollout_is_a_file_and_old_ones_go(tmp_path, capsys):
    trainer, _ = make(
        tmp_path, [even_tokens, second], log_completions_files=2, **{**LOGGED, "max_steps": 6}
    )
    trainer.train()
    files = sorted((tmp_path / "completions").iterdir())
    assert [file.name for file in files] == ["completions_000001.jsonl", "completions_000002.jsonl"]
    rows = rows_in(files[-1])
    assert len(rows) == 16
    row = rows[0]
    assert row["rollout"] == 2
    assert row["step"] == 4
    assert row["prompt"].startswith("user: ")
    assert all(0 <= code < 8 for code in row["codes"])
    assert row["reward"] == pytest.approx(
        row["rewards/even_tokens"] + (row["rewards/second"] or 0.0)
    )
    assert {r["rewards/second"] for r in rows} == {None, 2.0}
    advantages = torch.tensor([r["advantage"] for r in rows])
    torch.testing.assert_close(advantages, trainer._replay.advantages, rtol=1e-6, atol=0)
    printed = capsys.readouterr().out
    assert len(re.findall(r"rollout 2\s*\n", printed)) == 1


def test_a_resumed_run_leaves_the_files_of_the_uninterrupted_one(tmp_path):
    saving = {**LOGGED, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    whole, _ = make(tmp_path / "whole", **saving)
    whole.train()
    cut, _ = make(tmp_path / "cut", callbacks=[StopAt(3)], **saving)
    cut.train()
    make(tmp_path / "cut", **saving)[0].train(resume_from_checkpoint=True)
    texts = [
        {file.name: file.read_text() for file in (tmp_path / run / "completions").iterdir()}
        for run in ("whole", "cut")
    ]
    assert len(texts[0]) == 3
    assert texts[0] == texts[1]


def record(*prompts):
    count = len(prompts)
    return RolloutRecord(
        seeds=list(range(count)),
        prompts=list(prompts),
        completions=["[bold]a|b\nc"] * count,
        codes=[[1, 2]] * count,
        rewards=[0.5] * count,
        scores={},
    )


def test_tables_are_bounded_and_merged(tmp_path):
    tables = []
    log = CompletionsLog(
        tmp_path, files=1, unique_prompts=True, shown=0, gather=lambda rows: rows * 2, main=True
    )
    long = "x" * (2 * MAX_CHARACTERS)
    log.add(
        record("one", "one", long),
        torch.ones(3, 4),
        rollout=7,
        step=3,
        writers=[lambda rows, step: tables.append((step, [row["prompt"] for row in rows]))],
    )
    assert len(rows_in(tmp_path / "completions_000007.jsonl")) == 6  # of two processes
    ((step, prompts),) = tables
    assert step == 3
    assert prompts[0] == "one"
    assert len(prompts) == 2
    assert len(prompts[1]) == MAX_CHARACTERS
    other = CompletionsLog(
        tmp_path / "no", files=1, unique_prompts=False, shown=0, gather=list, main=False
    )
    other.add(record("one"), torch.ones(1), rollout=0, step=0, writers=[])
    assert not (tmp_path / "no").exists()


def test_cells_survive_markdown_and_markup(tmp_path, capsys):
    texts = []

    class Writer:
        def add_text(self, tag, text, step):
            texts.append(text)

    from transformers.integrations.integration_utils import TensorBoardCallback

    callback = object.__new__(TensorBoardCallback)
    callback.tb_writer = Writer()
    log = CompletionsLog(
        tmp_path, files=1, unique_prompts=False, shown=None, gather=list, main=True
    )
    writers = table_writers([callback])
    log.add(record("one"), torch.ones(1), rollout=0, step=0, writers=writers)
    assert "[bold]a\\|b<br>c | 1 2 | 0.5 | 1 |" in texts[0]
    assert "[bold]a|b" in capsys.readouterr().out


def test_prompts_in_words():
    turns = [
        {"role": "system", "content": "Be brief ."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What ?"}]},
    ]
    assert prompt_text(turns) == "system: Be brief .\nuser: <image> What ?"
    assert prompt_text("What ?") == "What ?"


def test_a_missing_tracker_is_one_line_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (
        ("wandb", "wandb"),
        ("tensorboard", "tensorboard"),
        ("trackio", "trackio"),
    ):
        with pytest.raises(ImportError, match=rf"report_to='{name}' .*: pip install {package}$"):
            config(tmp_path, report_to=name)
