"""Artifacts survive kills at every step, and a damaged, missing or stale one stops the reader with the notebook to run."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from src import artifacts, profiles, stages
from src.artifacts import ArtifactError, open_artifact, published_command, sources_changed, stale_reason, write_artifact
from src.pipeline import file_added
from src.sources import describe_source
from src.verified_folders import atomic_folder, verify_folder

KILL_AT_EVERY_STEP = textwrap.dedent("""
    import json, os, signal, sys
    from pathlib import Path
    from src.verified_folders import atomic_folder, recover, verify_folder

    target = Path(sys.argv[1]) / "tokenizer"
    STEPS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}

    def write(version):
        with atomic_folder(target, {"version": version}) as folder:
            (folder / "a.txt").write_text(version * 1000)
            (folder / "figures").mkdir()
            (folder / "figures" / "b.txt").write_text(version * 10)

    def kill_before_step(step):
        count = 0
        def hook(event, arguments):
            nonlocal count
            if event in STEPS:
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
        sys.addaudithook(hook)

    write("0")
    seen, killed, step, number = [], 0, 0, 1
    while True:
        child = os.fork()
        if child == 0:
            kill_before_step(step)
            write(str(number))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        recover(target)
        seen.append(verify_folder(target)["version"])
        if not os.WIFSIGNALED(status):
            break
        killed, step, number = killed + 1, step + 1, number % 9 + 1
    write("9")
    left = sorted(p.name for p in target.parent.iterdir())
    print(json.dumps({"killed": killed, "versions": len(set(seen)), "last": seen[-1], "left": left}))
""")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("ARTIFACTS_DIR", str(tmp_path))
    return profiles.settings_for("sample")


def write(settings, name, text="words", inputs=()):
    with write_artifact(settings, name, inputs=inputs, counts={"rows": np.int64(3)}) as folder:
        (folder / "data.txt").write_text(text)
    return open_artifact(settings, name)


def write_chain(settings):
    """All six artifacts, each made from what its stage reads."""
    made = {}
    for stage in stages.STAGES:
        for name in stage.outputs:
            made[name] = write(settings, name, inputs=[made[i] for i in stage.inputs])
    return made


def test_kill_before_every_step_leaves_the_old_or_the_new_folder(tmp_path):
    """Without the temporary sibling, the renames or `recover`, some kill leaves no folder or half of one."""
    result = subprocess.run([sys.executable, "-c", KILL_AT_EVERY_STEP, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["killed"] > 15
    assert outcome["versions"] > 2
    assert outcome["left"] == ["tokenizer"]


def test_an_error_while_writing_keeps_the_old_folder_and_leaves_nothing(settings, tmp_path):
    """Without the clean-up, a failed stage would leave its half-written folder behind."""
    old = write(settings, "tokenizer")
    with pytest.raises(RuntimeError, match="stopped"), write_artifact(settings, "tokenizer") as folder:
        (folder / "data.txt").write_text("half")
        raise RuntimeError("stopped")
    assert open_artifact(settings, "tokenizer").digest == old.digest
    assert [p.name for p in (tmp_path / "sample").iterdir()] == ["tokenizer"]


def test_a_full_disk_names_the_bytes_and_keeps_the_old_folder(settings, tmp_path):
    """Without the translation the user sees a bare OSError and does not know whether the old folder is safe."""
    old = write(settings, "tokenizer")
    with (
        pytest.raises(ArtifactError, match=r"disk full .* bytes written, .* free now, .* is kept as it was"),
        write_artifact(settings, "tokenizer"),
    ):
        raise OSError(28, "No space left on device")
    assert open_artifact(settings, "tokenizer").digest == old.digest


@pytest.mark.parametrize("stage", stages.STAGES, ids=lambda stage: stage.notebook)
@pytest.mark.parametrize("fault", ["missing", "missing file", "flipped byte", "edited manifest", "made anew", "edited setting"])
def test_every_upstream_fault_stops_the_reader(settings, stage, fault, monkeypatch):
    """Without the checks a stage would go on with input that is missing, damaged or older than its own inputs."""
    write_chain(settings)
    name = stage.outputs[0]
    path = profiles.artifacts_folder("sample") / name
    reader = name
    if fault == "missing":
        path.rename(path.with_name("elsewhere"))
    elif fault == "missing file":
        (path / "data.txt").unlink()
    elif fault == "flipped byte":
        (path / "data.txt").write_bytes(b"wordt")
    elif fault == "edited manifest":
        text = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(text.replace('"rows": 3', '"rows": 4'))
    elif fault == "made anew":
        readers = [s for s in stages.STAGES if name in s.inputs]
        if not readers:
            pytest.skip("nothing reads this artifact")
        write(settings, name, text="other words")
        reader = readers[0].outputs[0]
        stage = readers[0]
    elif fault == "edited setting":
        section = stage.sections[-1]
        changed = profiles.settings_for("sample", {f"{section}.seed": 7})
        monkeypatch.setitem(profiles.PROFILES, "sample", changed)
    with pytest.raises(ArtifactError) as error:
        open_artifact(settings, reader)
    assert f"run {stage.notebook}" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_edited_setting_far_upstream_stops_the_last_stage(settings, monkeypatch):
    """Without the walk up the inputs, fine-tuning would accept a model whose corpus settings have changed."""
    write_chain(settings)
    monkeypatch.setitem(profiles.PROFILES, "sample", profiles.settings_for("sample", {"corpus.vocab_size": 1500}))
    with pytest.raises(ArtifactError, match=r"corpus.vocab_size was \d+, is 1500\): run prepare_unsupervised"):
        open_artifact(settings, "text_to_text")


def test_overrides_of_an_upstream_run_are_remembered(settings):
    """Without it, a notebook opened by hand would call every artifact of a run with options stale."""
    with write_artifact(profiles.settings_for("sample", {"corpus.max_documents": 50}), "tokenizer") as folder:
        (folder / "data.txt").write_text("words")
    open_artifact(settings, "tokenizer")
    assert "max_documents was 50, is None" in stale_reason(settings, "tokenizer", exact=True)
    with pytest.raises(ArtifactError, match="max_documents was 50, is 60"):
        open_artifact(profiles.settings_for("sample", {"corpus.max_documents": 60}), "tokenizer")


def test_changed_code_only_warns(settings, monkeypatch):
    """Blocking on every edit of the code would make people delete the check."""
    write(settings, "tokenizer")
    monkeypatch.setattr(artifacts, "code_digest", lambda: "another")
    with pytest.warns(UserWarning, match="another version of the code"):
        open_artifact(settings, "tokenizer")


def test_same_content_keeps_its_digest(settings):
    """A digest with dates in it would make everything downstream stale after a rerun that changed nothing."""
    first = write(settings, "tokenizer")
    assert artifacts.content_digest({**first.manifest, "created": "tomorrow", "code": "another"}) == first.digest
    assert write(settings, "tokenizer").digest != write(settings, "tokenizer", text="other").digest


def test_a_changed_source_file_is_noticed(tmp_path):
    """Without it `make run` would call results of an older file current."""
    source = tmp_path / "news.csv"
    source.write_text("text\none")
    manifest = {
        "sources": [{"path": str(source), "bytes": 8, "sha256": artifacts.file_sha256(source), "modified_ns": source.stat().st_mtime_ns}]
    }
    os.utime(source, (1, 1))
    assert sources_changed(manifest) is None  # touched, same bytes
    source.write_text("text\ntwo")
    os.utime(source, (2, 2))
    assert "news.csv has changed" in sources_changed(manifest)


def test_a_file_added_to_a_folder_is_noticed(tmp_path):
    """README promises that changed data make a stage run again: news of another year is changed data."""
    (tmp_path / "2013.csv").write_text("text\none")
    settings, manifest = profiles.settings_for("sample", {"corpus.path": str(tmp_path)}), {"sources": describe_source(tmp_path)}
    assert file_added(settings, stages.STAGES[0], manifest) is None
    (tmp_path / "2014.csv").write_text("text\ntwo")
    assert "2014.csv is new" in file_added(settings, stages.STAGES[0], manifest)


def test_commands_are_published_without_folders():
    """A path of the machine a result was made on says nothing to its readers, in whichever form it was given."""
    command = published_command("m", ["--a", "/home/me/x.csv", "--b=/home/me/y.csv", "--set", "corpus.path=../z", "k=1", "results/mini"])
    assert command == "python -m m --a x.csv --b=y.csv --set corpus.path=z k=1 results/mini"


def test_verify_names_the_damaged_file_in_a_subfolder(tmp_path):
    """Files in subfolders count: a checkpoint's figures or shards must not be skipped."""
    with atomic_folder(tmp_path / "checkpoint", {"step": 3}) as folder:
        (folder / "figures").mkdir()
        (folder / "figures" / "loss.png").write_bytes(b"png")
    assert verify_folder(tmp_path / "checkpoint")["step"] == 3
    (tmp_path / "checkpoint" / "figures" / "loss.png").write_bytes(b"pnk")
    with pytest.raises(ArtifactError, match=r"figures/loss.png is damaged"):
        verify_folder(tmp_path / "checkpoint")
