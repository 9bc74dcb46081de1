"""Classifying text from Python and from the shell, on artifacts as the notebooks write them."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import T5Config

from src import finetuned_checkpoints, finetuning, predict
from src.artifacts import ArtifactError, open_artifact, write_artifact
from src.calibration import scale_temperature
from src.evaluation import PROBABILITY_COLUMNS
from src.labels import LABELS
from src.modeling_t5 import T5ForConditionalGeneration
from src.predict import Classifier, PredictionError
from src.profiles import settings_for
from src.qlora import AdapterError
from src.sample_data import sample_sentences
from src.tokenizer import train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*another version of the code")
ROOT = Path(__file__).parent.parent
TEXTS = ["Profit rose in the first quarter.", "Sales fell by 12%, more than expected.", "The report comes on Monday."]
TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """`pretrained`, `classification_head` and `text_to_text` of the sample profile, untrained: what they say does not matter here."""
    folder = tmp_path_factory.mktemp("artifacts")
    before, os.environ["ARTIFACTS_DIR"] = os.environ.get("ARTIFACTS_DIR"), str(folder)
    settings = settings_for("sample")
    with write_artifact(settings, "pretrained") as path:
        tokenizer = train_tokenizer([row["text"] for row in sample_sentences()[:1_000]], path, 500)
        config = T5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_heads=4, num_layers=1, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(path)
    base = open_artifact(settings, "pretrained")
    for name, task in (("classification_head", "classification"), ("text_to_text", "text_to_text")):
        chosen = getattr(settings, task)
        model = finetuning.prepare_model(task, base.path, chosen)
        with write_artifact(settings, name, inputs=[base]) as path:
            finetuned_checkpoints.save_finetuned(path, base.path, model, tokenizer, task, chosen, TEMPERATURE, "default")
    yield folder
    os.environ.pop("ARTIFACTS_DIR")
    if before is not None:
        os.environ["ARTIFACTS_DIR"] = before


def shell(artifacts, *arguments):
    """The command in a process of its own, as a user starts it: seconds of imports, so once is enough."""
    environment = {**os.environ, "ARTIFACTS_DIR": str(artifacts), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-m", "src.predict", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def command(artifacts, capsys, monkeypatch):
    """The command in this process: (arguments, standard input) -> (exit status, output, errors)."""

    def run(*arguments, text=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        status = predict.main(arguments)
        return status, *capsys.readouterr()

    return run


def test_shell_command(artifacts):
    """The command as README shows it must start, load and answer, with nothing on standard error."""
    result = shell(artifacts, TEXTS[0], "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["text"] == TEXTS[0]
    assert result.stderr == ""


@pytest.mark.parametrize("task", ["classification", "text_to_text"])
def test_shell_and_python_say_the_same(artifacts, command, task):
    """What the command prints must be what the model says: three probabilities after temperature scaling, text by text in order."""
    expected = Classifier.load("sample", task).classify(TEXTS)
    status, output, _ = command(*TEXTS, "--task", task, "--json")
    assert status == 0
    found = pd.DataFrame([json.loads(line) for line in output.splitlines()])
    assert found["text"].tolist() == TEXTS
    assert found["prediction"].tolist() == expected["prediction"].tolist()
    assert np.allclose(found[list(PROBABILITY_COLUMNS)], expected[list(PROBABILITY_COLUMNS)], atol=1e-4)


def test_probabilities_are_scaled_by_the_saved_temperature(artifacts):
    """Unscaled, the confidence shown is not the one whose calibration was measured."""
    classifier = Classifier.load("sample")
    settings = settings_for("sample")
    path, base = (open_artifact(settings, name).path for name in ("classification_head", "pretrained"))
    model, tokenizer, about = finetuned_checkpoints.load_finetuned(path, base, settings.classification)
    assert about["temperature"] == TEMPERATURE
    raw = finetuning.class_probabilities(model, tokenizer, TEXTS, settings.classification)
    assert np.allclose(classifier.classify(TEXTS)[list(PROBABILITY_COLUMNS)], scale_temperature(raw, TEMPERATURE))


def test_batches_and_long_texts_change_nothing_and_lose_nothing(artifacts):
    """A batch that shifts its answers, or an article whose end is never read."""
    classifier = Classifier.load("sample")
    texts = [f"{TEXTS[i % 3]} {i}" for i in range(40)]
    whole = classifier.classify(texts)
    assert np.allclose(whole[list(PROBABILITY_COLUMNS)], classifier.classify(texts, batch_size=7)[list(PROBABILITY_COLUMNS)], atol=2e-2)
    long = " ".join(TEXTS * 60)
    with_end = classifier.classify([long, long + " Bankruptcy, losses, default and fraud followed." * 30])
    assert not np.allclose(*with_end[list(PROBABILITY_COLUMNS)].to_numpy(), atol=1e-4)
    assert np.allclose(with_end[list(PROBABILITY_COLUMNS)].sum(axis=1), 1)


def test_texts_are_cleaned_as_those_of_training_were(artifacts):
    """A model that never saw a link or "3 %" in training judges raw text on other ground than that on which it was calibrated."""
    raw = ["LONDON (Reuters) - Sales fell by 12 %  https://t.co/x", "Profit rose &amp; more , it said ."]
    found = Classifier.load("sample").classify([*raw, "Sales fell by 12%", "Profit rose & more, it said."])
    assert found["text"].tolist()[:2] == raw
    probabilities = found[list(PROBABILITY_COLUMNS)].to_numpy()
    assert np.allclose(probabilities[:2], probabilities[2:], atol=1e-3)


def test_texts_come_from_a_file_or_standard_input(command, tmp_path):
    """One text a line, blank lines left out, a byte-order mark not part of the first word."""
    (tmp_path / "news.txt").write_text("\ufeff" + "\n\n".join(TEXTS) + "\n", encoding="utf-8")
    from_file, from_input = command("--file", str(tmp_path / "news.txt")), command(text="\n".join(TEXTS))
    assert from_file[0] == 0
    assert from_file[:2] == from_input[:2]
    assert len(from_file[1].splitlines()) == 3
    assert all(label in from_file[1] for label in LABELS)


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["  "], "", "text 1 of 1 is blank"),
        ([], "", "no text to classify"),
        (["--file", "no-such-file.txt"], "", "no-such-file.txt is not a file"),
        (["text", "--profile", "mini"], "", "is missing: run finetune_classification_head.ipynb"),
    ],
)
def test_errors_are_one_line_with_the_cure(command, arguments, text, message):
    """A traceback tells a user of the command nothing."""
    status, output, errors = command(*arguments, text=text)
    assert (status, output) == (1, "")
    assert message in errors
    assert len(errors.strip().splitlines()) == 1, errors


def test_damaged_and_mismatched_models_are_refused(artifacts, tmp_path):
    """A flipped byte or another base gives labels that look as good as any."""
    settings = settings_for("sample")
    head = open_artifact(settings, "classification_head").path
    torch.manual_seed(1)
    config = T5Config.from_pretrained(open_artifact(settings, "pretrained").path)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="belongs to base"):
        Classifier.from_folders(head, tmp_path / "other", settings.classification)
    file = head / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    try:
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is damaged.*run finetune_classification_head"):
            Classifier.load("sample")
    finally:
        content[-1] ^= 1
        file.write_bytes(content)


def test_no_text_is_an_error_in_python_too(artifacts):
    """An empty frame back would hide that nothing was asked."""
    model = Classifier.load("sample")
    for nothing in ([], "Profit rose."):  # a string would be taken for its letters
        with pytest.raises(PredictionError, match="no text to classify: give a list of texts"):
            model.classify(nothing)
    with pytest.raises(PredictionError, match="text 2 of 2 is blank, or was nothing but a link"):
        model.classify(["Profit rose.", "https://example.com/x"])
