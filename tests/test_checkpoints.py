"""Checkpoints: damage is noticed and named, room is checked, nothing of another model is loaded."""

import errno
import json
import logging
import shutil
from dataclasses import replace

import bitsandbytes
import pytest
import torch

from src import checkpoints as module
from src import verified_folders
from src.checkpoints import CheckpointError, Checkpoints, TrainingState, load_optimizer_state, split_optimizer_state
from src.optimizers import build_optimizer
from src.verified_folders import ArtifactError
from tests import tiny_run

FILES = ("weights.safetensors", "optimizer.safetensors", "state.json", "training_log.jsonl", "manifest.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run cut off by its budget of 12 steps, with checkpoints at 10 and 12."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_run.run(folder, max_steps=12)
    (run,) = folder.glob("run-*")
    return run


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / trained.name)
    return tmp_path / trained.name


def parts(optimizer="adamw_rms_scaled"):
    model = tiny_run.model_with()
    settings = tiny_run.replace(tiny_run.SETTINGS, optimizer=optimizer)
    return model, build_optimizer(model, settings), torch.amp.GradScaler("cpu", enabled=False)


def damage(path, how):
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["deleted", "truncated", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_passed_over(copy, caplog, name, how):
    """A damaged file that loads without complaint poisons everything trained afterwards."""
    damage(copy / "step-00000012" / name, how)
    with caplog.at_level(logging.WARNING):
        state, log = Checkpoints(copy).load_newest(*parts())
    assert state.step == 10
    assert max(record["step"] for record in log) == 10
    assert "passing over a checkpoint" in caplog.text
    assert "step-00000012" in caplog.text


def test_a_damaged_checkpoint_is_not_what_to_fall_back_to(copy):
    """Kept in the place of a good one, it leaves nothing when the next is damaged too."""
    damage(copy / "step-00000012" / "weights.safetensors", "flipped")
    kept = Checkpoints(copy)
    model, optimizer, scaler = parts()
    state, log = kept.load_newest(model, optimizer, scaler)
    kept.save(model, optimizer, scaler, replace(state, step=11), log)
    damage(copy / "step-00000011" / "weights.safetensors", "flipped")
    assert Checkpoints(copy).load_newest(model, optimizer, scaler)[0].step == 10


def test_a_checkpoint_that_the_disk_cannot_read_is_passed_over(copy, monkeypatch):
    """A bad sector under the newest one must not hide the good one beside it."""
    hashed = verified_folders.file_sha256

    def unreadable(path):
        if path.parent.name == "step-00000012":
            raise OSError(errno.EIO, "Input/output error")
        return hashed(path)

    monkeypatch.setattr(verified_folders, "file_sha256", unreadable)
    assert Checkpoints(copy).load_newest(*parts())[0].step == 10


@pytest.mark.parametrize("name", FILES)
def test_when_all_are_damaged_it_refuses(copy, name):
    """Starting anew in silence would throw a run away."""
    for folder in copy.glob("step-*"):
        damage(folder / name, "truncated")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged .*step-00000012.*: remove"):
        Checkpoints(copy).load_newest(*parts())


@pytest.mark.parametrize("how", ["deleted", "flipped"])
def test_damaged_best_weights_are_refused(copy, how):
    """The best weights become the artifact: they are checked like the rest."""
    damage(copy / "best" / "weights.safetensors", how)
    with pytest.raises(ArtifactError, match=r"best/weights.safetensors is (missing|damaged)"):
        Checkpoints(copy).load_best(parts()[0])


def test_no_checkpoint_is_a_new_run(tmp_path):
    assert Checkpoints(tmp_path / "none").load_newest(*parts()) is None


def test_full_disk_is_told_before_and_the_old_checkpoint_stays(copy, monkeypatch):
    """Said with the number of bytes missing, before a byte is written."""
    before = sorted(path.name for path in copy.glob("step-*"))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1_000, 1_000))
    with pytest.raises(CheckpointError, match=r"1,000 free: free [\d,]+ bytes more.*earlier checkpoints are kept"):
        Checkpoints(copy).save(*parts(), TrainingState(step=13), [])
    assert sorted(path.name for path in copy.glob("step-*")) == before


def test_disk_that_fills_while_writing(copy, monkeypatch):
    """Others write too: the same must hold when the room is gone half-way."""
    saved = module.save_tensors

    def full(tensors, path):
        saved(tensors, path)
        if path.name == module.OPTIMIZER:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_tensors", full)
    model, optimizer, scaler = parts()
    with pytest.raises(ArtifactError, match="disk full"):
        Checkpoints(copy).save(model, optimizer, scaler, TrainingState(step=13), [])
    monkeypatch.undo()
    assert sorted(path.name for path in copy.iterdir()) == ["best", "step-00000010", "step-00000012"]
    assert Checkpoints(copy).load_newest(model, optimizer, scaler)[0].step == 12


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_rms_scaled", "muon", "adafactor_t5"])
def test_optimizer_state_survives_the_round_trip(optimizer):
    """An optimizer that comes back with fresh moments takes its first steps blindly; each recipe keeps other things."""
    model, first, _ = parts(optimizer)
    batch = tiny_run.source().epoch(0)[0]
    for _ in range(2):
        model(**batch).loss.backward()
        first.step()
    tensors, plain = split_optimizer_state(first)
    _, second, _ = parts(optimizer)
    load_optimizer_state(second, tensors, json.loads(json.dumps(plain)))
    one, other = first.state_dict(), second.state_dict()
    assert one["state"].keys() == other["state"].keys() != set()
    for index, entries in one["state"].items():
        assert entries.keys() == other["state"][index].keys()
        for key, value in entries.items():
            same = torch.equal(value, other["state"][index][key]) if torch.is_tensor(value) else value == other["state"][index][key]
            assert same, (index, key)


def test_state_of_an_8_bit_optimizer_survives_the_round_trip():
    """bitsandbytes hides its tensors one level deeper than others do: looked for where others have them, no checkpoint can be written."""

    def stepped(steps):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8_192).reshape(64, 128))
        optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=0.01)
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return parameter, optimizer

    (old, first), (new, second) = stepped(2), stepped(0)
    tensors, plain = split_optimizer_state(first)
    load_optimizer_state(second, tensors, json.loads(json.dumps(plain)))
    saved, found = first.state[old], second.state[new]
    assert saved.keys() == found.keys() > {"state1", "state2", "absmax1"}
    for key, value in saved.items():
        assert torch.equal(value, found[key]) if torch.is_tensor(value) else value == found[key], key


def test_what_a_killed_writer_left_of_another_step_goes(copy):
    """A resumed run saves other steps: each kill in mid-save would leave a whole checkpoint behind for ever."""
    left = copy / ".step-00000007.new-999999999"
    left.mkdir()
    model, optimizer, scaler = parts()
    Checkpoints(copy).save(model, optimizer, scaler, TrainingState(step=13), [])
    assert not left.exists()
    (copy / "best").rename(copy / ".best.previous")  # killed between the two renames of an evaluation's save
    assert Checkpoints(copy).load_best(model)["step"] > 0


def test_weights_of_another_model_are_refused(copy):
    """Loading what fits and leaving the rest as it was would mix two models."""
    model, *_ = parts()
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError, match="of another model"):
        module.load_weights(model, copy / "step-00000012")
