"""The five notebooks: their shape as committed, and a real run of all of them on the bundled sample."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from src import pipeline, pretrain, profiles, stages
from src.modeling_t5 import T5ForConditionalGeneration
from tests import tiny_run

ROOT = Path(__file__).parent.parent
STAGES = stages.STAGES
BY_NAME = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.notebook.removesuffix(".ipynb"))


def read(stage):
    return nbformat.read(ROOT / stage.notebook, as_version=4)


def code_cells(stage):
    return [cell for cell in read(stage).cells if cell.cell_type == "code"]


@BY_NAME
def test_committed_notebook_was_run_on_the_sample(stage):
    """A notebook committed unexecuted, out of order, with an error or with widgets shows a stranger nothing; style sheets are dropped."""
    notebook = read(stage)
    nbformat.validate(notebook)
    cells = code_cells(stage)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.metadata["executed_sources"] == pipeline.sources_digest(notebook), "edited since: run `make notebooks`"
    assert (ROOT / stage.notebook).stat().st_size < 400_000
    assert "widgets" not in notebook.metadata
    text = (ROOT / stage.notebook).read_text(encoding="utf-8")
    assert "widget-view" not in text
    assert "<style type=" not in text
    assert not re.search(r"/work/|/home/|/root/|/tmp/|site-packages", text)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


@BY_NAME
def test_one_notebook_shape(stage):
    """Purpose, the common set-up, one parameters cell with the sample's defaults, and no long definitions."""
    assert read(stage).cells[0].source.startswith("# ")
    cells = code_cells(stage)
    assert cells[0].source == code_cells(STAGES[0])[0].source
    parameters = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(parameters[0].source).body}
    assert values == {"PROFILE": "sample", "OVERRIDES": {}}
    for cell in cells:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.end_lineno - node.lineno < 10, f"{node.name} belongs in src"


@BY_NAME
def test_notebook_opens_and_writes_what_its_stage_declares(stage):
    """A notebook that reads around `open_artifact` would accept damaged or stale input."""
    source = "\n".join(cell.source for cell in code_cells(stage))
    assert set(re.findall(r'open_artifact\(settings, "(\w+)"\)', source)) - set(stage.outputs) == set(stage.inputs)
    assert set(re.findall(r'write_artifact\(\s*settings, "(\w+)"', source)) == set(stage.outputs)


# ---- a real run ----------------------------------------------------------------------------------------------------


def run_pipeline(folder, *arguments):
    environment = {**os.environ, "ARTIFACTS_DIR": str(folder)}
    command = [sys.executable, "-m", "src.pipeline", "run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sample_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    result = run_pipeline(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.mark.notebooks
def test_the_pipeline_runs_end_to_end_on_the_sample(sample_run):
    """The promise of the README: one command, five notebooks, scores of every model on the same test rows."""
    folder, output = sample_run
    assert output.count(": done in ") == len(STAGES)
    models = {model["name"]: model for model in json.loads((folder / "sample/text_to_text/comparison.json").read_text())["models"]}
    assert {"majority", "tfidf_svm", "random_init", "pretrained_head_qlora", "text_to_text_qlora"} <= set(models)
    test_rows = pd.read_parquet(folder / "sample/finetuning_dataset/test.parquet")
    for name in ("classification_head", "text_to_text"):
        predictions = pd.read_parquet(folder / f"sample/{name}/predictions.parquet")
        for model, rows in predictions.groupby("model"):
            assert sorted(rows.text_id) == sorted(test_rows.text_id), model
    for name in ("pretrained_head_qlora", "text_to_text_qlora"):
        assert models[name]["macro_f1"] > models["majority"]["macro_f1"] + 0.1
    for name, model in models.items():
        assert re.search(rf"^{re.escape(name)} +{model['accuracy']:.3f} ", output, re.MULTILINE), name


@pytest.mark.notebooks
def test_a_second_run_redoes_nothing(sample_run):
    """Without it every `make run` costs the whole time again."""
    folder, _ = sample_run
    before = {path: path.stat().st_mtime_ns for path in (folder / "sample").rglob("manifest.json")}
    result = run_pipeline(folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": current, nothing to do") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "sample").rglob("manifest.json")}
    part = run_pipeline(folder, "--through", "2")
    assert part.returncode == 0, part.stderr
    assert part.stdout.count(": current, nothing to do") == 2


@pytest.mark.notebooks
@pytest.mark.parametrize("fault", ["flipped byte", "missing file", "edited setting"])
@pytest.mark.parametrize("stage", STAGES[1:], ids=lambda stage: stage.notebook.removesuffix(".ipynb"))
def test_a_damaged_input_stops_the_notebook_itself(sample_run, stage, fault, tmp_path, monkeypatch):
    """The checks hold in the notebook, not only in the function: one line that names the notebook to run."""
    folder, _ = sample_run
    shutil.copytree(folder / "sample", tmp_path / "sample")
    monkeypatch.setenv("ARTIFACTS_DIR", str(tmp_path))
    damaged = tmp_path / "sample" / stage.inputs[-1]
    settings = profiles.settings_for("sample")
    if fault == "edited setting":
        settings = profiles.settings_for("sample", {f"{stages.stage_of(damaged.name).sections[-1]}.seed": 12345})
    else:
        victim = next(path for path in sorted(damaged.iterdir()) if path.is_file() and path.name != "manifest.json" and path.stat().st_size)
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.unlink() if fault == "missing file" else victim.write_bytes(data)
    with pytest.raises(pipeline.StageError) as error:
        pipeline.run_notebook(settings, stage, "test")
    upstream = stages.stage_of(damaged.name)
    assert f"run {upstream.notebook}" in str(error.value)
    # An edited setting makes all that its stage wrote stale: the first that is opened is named.
    assert any(name in str(error.value) for name in (upstream.outputs if fault == "edited setting" else [damaged.name]))
    assert "\n" not in str(error.value)


@pytest.mark.notebooks
def test_what_several_processes_trained_is_found_by_the_notebook(sample_run, tmp_path, monkeypatch):
    """The way to several GPUs: if launcher and notebook, or its cell run twice, named the run differently, hours would be trained again."""
    folder, _ = sample_run
    for name in ("tokenizer", "pretraining_dataset"):
        shutil.copytree(folder / "sample" / name, tmp_path / "sample" / name)
    monkeypatch.setenv("ARTIFACTS_DIR", str(tmp_path))
    trained = tiny_run.two_processes("src.pretrain", "--profile", "sample", "--set", "pretraining.max_steps=4")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert trained.stdout.count("trained to step 4") == 1
    settings = profiles.settings_for("sample", {"pretraining.max_steps": 4})
    stage = stages.stage_of("pretrained")
    notebook = nbformat.read(pipeline.ROOT / stage.notebook, as_version=4)
    (training,) = (cell for cell in notebook.cells if "result = pretrain(" in cell.source)
    notebook.cells.insert(notebook.cells.index(training) + 1, nbformat.v4.new_code_cell(training.source))  # as a person runs it again
    nbformat.write(notebook, tmp_path / "twice.ipynb")
    copy = pipeline.run_notebook(settings, replace(stage, notebook=str(tmp_path / "twice.ipynb")), "test")
    assert copy.read_text(encoding="utf-8").count("finished already at step 4") == 2
    assert json.loads((tmp_path / "sample/pretrained/manifest.json").read_text())["counts"]["steps"] == 4


@pytest.mark.notebooks
def test_pretraining_goes_on_from_a_checkpoint(sample_run, tmp_path, monkeypatch, capsys):
    """What was learned is where it starts, and other weights at the same place make another run, not the rest of this one."""
    folder, _ = sample_run
    for name in ("tokenizer", "pretraining_dataset", "pretrained"):
        shutil.copytree(folder / "sample" / name, tmp_path / "sample" / name)
    earlier = (tmp_path / "sample" / "pretrained").rename(tmp_path / "earlier")
    monkeypatch.setenv("ARTIFACTS_DIR", str(tmp_path))
    still = {"pretraining.initialisation": str(earlier), "pretraining.max_steps": 1, "pretraining.learning_rate": 1e-9}
    settings = profiles.settings_for("sample", still)
    known = json.loads((earlier / "metrics.json").read_text())["validation_loss"]
    assert pretrain.run(settings).best["metrics"]["validation_loss"] == pytest.approx(known, abs=1e-3)
    model = T5ForConditionalGeneration.from_pretrained(earlier)
    model.shared.weight.data.mul_(1.1)
    model.save_pretrained(earlier)
    assert pretrain.run(settings).best["metrics"]["validation_loss"] > known + 1e-3
    assert "finished already" not in capsys.readouterr().out


def test_progress_bars_collapse_to_their_last_state():
    """Without it a committed notebook holds hundreds of copies of every bar."""
    assert pipeline.collapse_carriage_returns("\r 10%|#\r 90%|####\r100%|#####\nloss 1\n") == "100%|#####\nloss 1\n"
    assert pipeline.collapse_carriage_returns("plain\ntext") == "plain\ntext"
