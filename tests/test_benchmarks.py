"""Numbers on the pages come from results/ by a command, and a benchmark's last line is what is kept."""

import json
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import decoding, pretraining_ingredients, readme
from benchmarks.publish import make_command
from src.modeling_t5 import T5ForConditionalGeneration
from src.pretraining import model_config
from src.profiles import settings_for
from src.tokenizer import load_tokenizer


@pytest.mark.parametrize("page", readme.PAGES)
def test_pages_show_what_results_hold(page):
    """A figure typed by hand outlives the result it came from."""
    text = (readme.ROOT / page).read_text(encoding="utf-8")
    assert readme.render(text) == text


def test_results_become_tables(tmp_path, monkeypatch):
    """Single values become rows, measures of the same cases share a table, models become a table, command and note stand below."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    record = {
        "command": "python -m benchmarks.speed",
        "machine": "CPU, 2 cores",
        "note": "one core was busy",
        "result": {"ratio": 1.5, "seconds": {"half": 2.5, "whole": 5.0}, "peak_mb": {"half": 1000, "whole": 1234}, "best": None},
    }
    (tmp_path / "results/speed.json").write_text(json.dumps(record))
    svm = {"name": "svm", "accuracy": 0.75, "accuracy_ci95": [0.5, 1.0], "macro_f1": 0.7, "without_overlap": {"rows": 9, "accuracy": 0.625}}
    head = {"name": "head", "accuracy": 0.875, "accuracy_ci95": [0.5, 1.0], "macro_f1": 0.8, "seconds": 12.5, "parameters": 15.125}
    (tmp_path / "results/news.json").write_text(json.dumps({"command": "compare", "models": [svm, head]}))
    page = readme.render("a\n<!-- results speed -->\nold\n<!-- end -->\n<!-- results news -->\n<!-- end -->\n")
    assert "old" not in page
    for line in (
        "| ratio | 1.50 |",
        "| | half | whole |",
        "| peak memory, MB | 1,000 | 1,234 |",
        "| best | not reached |",
        "`python -m benchmarks.speed`, CPU, 2 cores: one core was busy",
    ):
        assert line in page
    models = [line for line in page.splitlines() if line.startswith(("| model", "| svm", "| head"))]
    assert models == [
        "| model | accuracy | 95 % | macro-F1 | accuracy without near duplicates of train | parameters, M | training, s |",
        "| head | 0.875 | 0.500 to 1.00 | 0.800 |  | 15.12 | 12.50 |",
        "| svm | 0.750 | 0.500 to 1.00 | 0.700 | 0.625 |  |  |",
    ]
    assert readme.render(page) == page
    lengths = [{"words": "3-9", "macro_f1": 0.5}, {"words": "10-30", "macro_f1": 0.75}]
    calibrated = {"ece": 0.125, "ece_scaled": 0.0625, "temperature": 2.5, "by_length": lengths}
    head |= calibrated | {"generated": [{"accuracy": 0.75, "invalid_rate": 0.25}, {"accuracy": 0.25, "invalid_rate": 0.0}]}
    (tmp_path / "results/news.json").write_text(json.dumps({"command": "compare", "models": [svm | {"by_length": lengths}, head]}))
    details = readme.render(page).split("| model | ECE", 1)[1].splitlines()
    assert details[2:4] == ["| head | 0.125 | 0.0625 | 2.50 | 0.500 | 0.125 | 0.500 (3-9), 0.750 (10-30) |", ""]


def test_comparisons_share_a_table(tmp_path, monkeypatch):
    """A model that one of them lacks would leave its figures under another's name, or lead because it was judged on the easier one."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    pair = {"first": "head", "second": "svm", "accuracy_difference": 0.0625, "accuracy_difference_ci95": [-0.01, 0.125]}
    for name, scores in {"tweets": {"svm": 0.7, "lora": 0.72, "head": 0.75}, "news": {"head": 0.5, "svm": 0.25}}.items():
        models = [{"name": model, "accuracy": 0.625, "macro_f1": score} for model, score in scores.items()]
        others = [pair | {"first": model} for model in scores if model != "svm"]
        (tmp_path / f"results/{name}.json").write_text(json.dumps({"models": models, "comparisons": others}))
    assert readme.render("<!-- results tweets news -->\n<!-- end -->").splitlines()[1:-1] == [
        "| accuracy / macro-F1 | tweets | news |",
        "|---|---:|---:|",
        "| head | 0.625 / 0.750 | 0.625 / 0.500 |",
        "| lora | 0.625 / 0.720 | – |",
        "| svm | 0.625 / 0.700 | 0.625 / 0.250 |",
        "",
        "| difference of accuracy, 95 % | tweets | news |",
        "|---|---:|---:|",
        "| head over svm | +0.062, -0.010 to +0.125 | +0.062, -0.010 to +0.125 |",
        "| lora over svm | +0.062, -0.010 to +0.125 | – |",
    ]
    monkeypatch.setattr(readme, "SUMMARY_BASELINE", "svm")
    monkeypatch.setattr(readme, "CONTROL", "lora")
    assert [line for line in readme.render("<!-- summary tweets news -->\n<!-- end -->").splitlines() if "over svm" in line] == [
        "| head over svm | +0.062, -0.010 to +0.125 | +0.062, -0.010 to +0.125 |",
    ]


def test_decoding_is_compared_with_the_standard_cache_of_the_same_case():
    """A ratio turned round, or taken across batches or number formats, would make the slim cache look better or worse than it is."""

    def case(batch, dtype, kind, size, speed):
        return {"source": 40, "target": 4, "batch": batch, "dtype": dtype, "kind": kind, "cache_bytes": size, "tokens_per_s": speed}

    standard = [case(1, "bf16", "kv", 600, 10.0), case(8, "bf16", "kv", 4800, 20.0), case(1, "fp32", "kv", 1200, 5.0)]
    slim = [case(1, "fp32", "x+e", 200, 4.0), case(1, "bf16", "x+e", 100, 15.0), case(8, "bf16", "x+e", 800, 40.0)]
    stock = [case(1, "bf16", "stock", 700, 12.0), case(8, "bf16", "stock", 5000, 50.0), case(1, "fp32", "stock", 1300, 8.0)]
    assert decoding.over_the_grid([*standard, *slim, *stock, case(1, "bf16", "k+e", 300, 99.0)]) == {
        "smaller": {"40_to_4": 6.0},
        "faster_fp32_batch_1": {"40_to_4": 0.8},
        "faster_bf16_batch_1": {"40_to_4": 1.5},
        "faster_bf16_batch_8": {"40_to_4": 2.0},
        "faster_than_stock_fp32_batch_1": {"40_to_4": 0.5},
        "faster_than_stock_bf16_batch_1": {"40_to_4": 1.25},
        "faster_than_stock_bf16_batch_8": {"40_to_4": 0.8},
    }


def test_shapes_are_compared_at_equal_size():
    """A deeper or wider model with more weights would win by those."""
    tokenizer = load_tokenizer(readme.ROOT / "results/mini_relabelled")

    def parameters(change):
        with torch.device("meta"):
            model = T5ForConditionalGeneration(model_config(settings_for("mini", change).model, tokenizer))
        return model.num_parameters()

    expected = parameters({})
    for name, change in pretraining_ingredients.CHANGES.items():
        assert parameters(change) == pytest.approx(expected, rel=0.02), name


def test_no_result_file_names_a_folder_of_the_machine_it_ran_on():
    """Results are published: a reader can do nothing with somebody's home folder."""
    for path in (readme.ROOT / "results").glob("*.json"):
        assert not re.search(r"/(work|home|root|tmp)/", path.read_text(encoding="utf-8")), path.name


def test_the_command_of_a_published_model_makes_it_again():
    """An override that went missing, or one that the reader's own path replaces, makes another model."""
    overrides = {"corpus.path": "/data/news", "pretraining.max_minutes": 7.0, "pretraining.optimizer": "muon", "pretraining.seed": 3}
    assert make_command("mini", overrides) == "make run PROFILE=mini CORPUS=news MINUTES=7.0 SET=pretraining.seed=3"
    overrides = {"corpus.path": "genloop/news", "corpus.tokenizer": "/home/me/mini", "pretraining.initialisation": "results/mini"}
    command = "make run PROFILE=mini CORPUS=genloop/news SET='corpus.tokenizer=mini pretraining.initialisation=results/mini'"
    assert make_command("mini", overrides) == command


def test_a_failed_benchmark_records_nothing():
    """Without the check, a crash would overwrite the last good figures."""
    result = subprocess.run([sys.executable, "-m", "benchmarks.record", "absent"], cwd=readme.ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "nothing was recorded" in result.stderr
    assert not (readme.ROOT / "results/absent.json").exists()
