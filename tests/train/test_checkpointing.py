"""Checkpoint directories: whole or not there, rotation, full disks, two runs in one place."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import subprocess

import pytest
import torch

from latent_rl.train import InverseWarmup, StageTrainer
from latent_rl.train.checkpointing import (
    COMPLETE_MARK,
    CheckpointWriteError,
    checkpoints,
    is_complete,
    latest_checkpoint,
    mark_complete,
    put_back,
    recover,
    remove,
    rotate,
    set_aside,
    what_is_missing,
)
from latent_rl.train.run_lock import RunInUseError, run_lock
from tests.train.test_stage_trainer import StopAt, arguments
from tests.train.tiny_world import moved, snapshot, tiny_world

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}


def checkpoint(run_dir, step, *, whole=True, content="weights"):
    directory = run_dir / f"checkpoint-{step}"
    (directory / "nested").mkdir(parents=True)
    (directory / "model").write_text(content)
    (directory / "nested" / "file").write_text("more")
    if whole:
        mark_complete(directory, {"global_step": step})
    return directory


def names(run_dir):
    return sorted(path.name for path in run_dir.iterdir())


def test_a_checkpoint_is_complete_with_every_file_in_full_length(tmp_path):
    directory = checkpoint(tmp_path, 4)
    assert what_is_missing(directory) is None
    (directory / "nested" / "file").write_text("mo")
    assert what_is_missing(directory) == "its nested/file has 2 bytes instead of 4"
    (directory / "nested" / "file").unlink()
    assert what_is_missing(directory) == "its nested/file is missing"
    (directory / COMPLETE_MARK).write_text("{")
    assert "cannot be read" in what_is_missing(directory)
    (directory / COMPLETE_MARK).unlink()
    assert "was interrupted" in what_is_missing(directory)
    assert what_is_missing(tmp_path / "checkpoint-5") == "it does not exist"


def test_the_latest_complete_one_is_taken_and_others_are_named(tmp_path, caplog):
    checkpoint(tmp_path, 9, whole=False)
    good = checkpoint(tmp_path, 8)
    checkpoint(tmp_path, 10, whole=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert latest_checkpoint(tmp_path) == good
    assert "checkpoint-10 is no complete checkpoint and is passed over" in caplog.text
    assert "checkpoint-9 is" in caplog.text
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_rotation_keeps_the_limit_the_new_and_the_best(tmp_path):
    made = {step: checkpoint(tmp_path, step) for step in (1, 2, 3, 10, 20)}
    checkpoint(tmp_path, 4, whole=False)
    rotate(tmp_path, None, [made[20]])
    assert len(checkpoints(tmp_path)) == 6
    # 20 may be an earlier run's: the one just written stays whatever its number.
    rotate(tmp_path, 3, [made[10], made[1]])
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-10", "checkpoint-20"]
    rotate(tmp_path, 1, [made[10], made[1]])
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-10"]


def test_a_removed_checkpoint_loses_its_mark_first(tmp_path, monkeypatch):
    directory = checkpoint(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # killed at this point
    remove(directory)
    assert not is_complete(directory)
    assert (directory / "model").exists()


def test_what_cannot_be_removed_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    def busy(path):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    made = [checkpoint(tmp_path, step) for step in (1, 2)]
    monkeypatch.setattr(shutil, "rmtree", busy)
    rotate(tmp_path, 1, made[1:])
    assert "checkpoint-1 could not be removed: [Errno 16]" in caplog.text


def test_a_checkpoint_of_the_same_step_is_replaced_when_the_new_one_is_whole(tmp_path):
    old = checkpoint(tmp_path, 4, content="old")
    set_aside(old)
    assert checkpoints(tmp_path) == []
    checkpoint(tmp_path, 4, whole=False, content="new")
    recover(tmp_path)  # the new one was not finished
    assert is_complete(old)
    assert (old / "model").read_text() == "old"
    set_aside(old)
    checkpoint(tmp_path, 4, content="new")
    recover(tmp_path)
    assert (old / "model").read_text() == "new"
    assert names(tmp_path) == ["checkpoint-4"]
    (old / COMPLETE_MARK).unlink()
    set_aside(old)  # remains of an interrupted one
    assert names(tmp_path) == []
    checkpoint(tmp_path, 4, whole=False)
    put_back(old)
    assert names(tmp_path) == []


# A disk that fills up.


def trainer_of(world, path, **changes):
    return StageTrainer(
        world.model,
        InverseWarmup(1e-3),
        arguments(path, **{**SAVING, **changes}),
        world.rows,
        processing_class=world.processor,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of an undisturbed run, and the size of a checkpoint in bytes."""
    out = tmp_path_factory.mktemp("whole")
    world = tiny_world()
    trainer_of(world, out).train()
    files = (out / "checkpoint-2").rglob("*")
    return snapshot(world.model), sum(path.stat().st_size for path in files)


def assert_stopped_cleanly(out, error, step):
    message = str(error.value)
    assert message.startswith(f"{out / f'checkpoint-{step}'} could not be written: ")
    assert "bytes of it were there" in message
    assert "bytes are free" in message
    assert f"the last complete one is {out / 'checkpoint-2'} (" in message
    assert names(out) == ["checkpoint-2"]
    assert is_complete(out / "checkpoint-2")


@pytest.fixture
def small_disk(tmp_path, whole):
    """A file system with room for one checkpoint and a half; a function makes it large."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={whole[1] * 3 // 2}", "tmpfs", str(disk)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_and_a_trainer_that_can_go_on(small_disk, whole):
    disk, enlarge = small_disk
    world = tiny_world()
    trainer = trainer_of(world, disk, save_total_limit=3)
    with pytest.raises(CheckpointWriteError) as error:
        trainer.train()
    assert_stopped_cleanly(disk, error, 4)
    assert trainer.args.save_total_limit == 3
    enlarge()
    trainer.train(resume_from_checkpoint=True)
    assert moved(whole[0], world.model) == set()


def test_a_file_beyond_the_limit_is_treated_as_a_full_disk(tmp_path, whole):
    world = tiny_world()
    first = trainer_of(world, tmp_path)
    first.add_callback(StopAt(2))
    first.train()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole[1] // 8, hard))
    try:
        with pytest.raises(CheckpointWriteError, match="could not be written") as error:
            trainer_of(tiny_world(), tmp_path).train(resume_from_checkpoint=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_stopped_cleanly(tmp_path, error, 4)


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("transformers.trainer.Trainer._save_rng_state", "No space left"),
        ("latent_rl.train.base_trainer.mark_complete", "No space left"),
    ],
)
def test_a_failed_write_at_any_point_is_undone(tmp_path, monkeypatch, target, wanted):
    trainer = trainer_of(tiny_world(), tmp_path)
    trainer.add_callback(StopAt(2))
    trainer.train()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target, full)
    with pytest.raises(CheckpointWriteError, match=wanted) as error:
        trainer_of(tiny_world(), tmp_path).train(resume_from_checkpoint=True)
    assert_stopped_cleanly(tmp_path, error, 4)


def test_a_defect_is_not_blamed_on_the_disk(tmp_path):
    trainer = trainer_of(tiny_world(), tmp_path)
    trainer.stateful.add("defect", torch.nn.Identity())
    trainer.stateful._parts["defect"][0].state_dict = lambda: {"x": object()}
    with pytest.raises(TypeError, match="must be a tensor"):
        trainer.train()
    assert names(tmp_path) == []


# Bad files.


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("optimizer.pt", r"optimizer\.pt"),
        ("rng_state.pth", r"rng_state\*\.pth"),
        ("trainer_state.json", r"trainer_state\.json"),
        ("latent_model.safetensors", r"latent_model\.safetensors"),
        ("state-averages.rank0.safetensors", r"state-averages\.rank0\.safetensors"),
    ],
)
def test_a_corrupt_file_is_named(trained, file, named):
    path = trained / "checkpoint-2" / file
    path.write_bytes(b"\xff" * path.stat().st_size)  # the length is right
    with pytest.raises(ValueError, match=rf"{named}"):
        trainer_of(tiny_world(), trained).train(resume_from_checkpoint=True)


@pytest.fixture
def trained(tmp_path, finished):
    """A copy of a run stopped after its first checkpoint."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    trainer = trainer_of(tiny_world(), out)
    trainer.add_callback(StopAt(2))
    trainer.train()
    return out


# Two runs.


def hold(run_dir, ready, end):
    with run_lock(run_dir):
        ready.set()
        end.wait(60)


def test_two_processes_cannot_train_in_one_directory(trained):
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(trained, ready, end))
    other.start()
    assert ready.wait(60)
    trainer = trainer_of(tiny_world(), trained, max_steps=3)
    with pytest.raises(RunInUseError, match=rf'in use by another run .*"pid": {other.pid}'):
        trainer.train(resume_from_checkpoint=True)
    os.kill(other.pid, 9)  # the lock goes with the process, the file stays
    other.join()
    assert (trained / ".run.lock").is_file()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert not (trained / ".run.lock").exists()


def test_a_new_run_among_old_checkpoints_is_warned_of(trained, caplog):
    trainer_of(tiny_world(), trained, max_steps=1).train()
    assert f"holds checkpoints of an earlier one up to {trained / 'checkpoint-2'}" in caplog.text
    assert json.loads((trained / "checkpoint-1" / COMPLETE_MARK).read_text())["global_step"] == 1
