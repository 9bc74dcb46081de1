"""The cross-validated comparison: fair folds, jobs that are done once, scores of what was judged."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config

from src import compare, comparison_report, cross_validation
from src.collators import TextsCutWarning
from src.evaluation import PROBABILITY_COLUMNS, predictions_frame
from src.modeling_t5 import T5ForConditionalGeneration
from src.profiles import settings_for
from src.qlora import QuantisationError
from src.sample_data import sample_sentences
from src.splits import SplitError
from src.tokenizer import train_tokenizer

MODELS = "majority,tfidf_svm,random_init,pretrained_head"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([row["text"] for row in sample_sentences()[:1_000]], folder, 500)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_heads=4, num_layers=1, decoder_start_token_id=0)
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """The command on 240 sample sentences with two folds and two training steps; options as on the command line."""
    monkeypatch.setenv("ARTIFACTS_DIR", str(tmp_path))

    def run_command(*options):
        parser = argparse.ArgumentParser()
        compare.add_arguments(parser)
        small = ("labelled.max_documents=240", "classification.max_steps=2")
        sets = [part for setting in small for part in ("--set", setting)]
        common = ["--labelled", "sample", "--profile", "sample", "--base", str(base), "--folds", "2", "--models", MODELS, *sets]
        return compare.run(parser.parse_args([*common, *options]))

    return run_command


def refuse(*_, **__):
    raise AssertionError("trained again")


def test_a_finished_job_is_not_run_again(run, monkeypatch):
    """Hours of folds would be lost with every interruption, or an old result taken for a new setting."""
    first = run()
    assert [model["name"] for model in first["models"]] == MODELS.split(",")
    assert all(model["rows"] == first["rows"] for model in first["models"])
    assert {(pair["first"], pair["second"]) for pair in first["comparisons"]} == {
        ("random_init", "tfidf_svm"), ("pretrained_head", "tfidf_svm"), ("pretrained_head", "random_init"),
    }  # fmt: skip
    monkeypatch.setattr(cross_validation, "finetune", refuse)
    monkeypatch.setattr("src.precision.best_precision", lambda: "fp32")
    again = run("--set", "classification.precision=auto")  # the format counts that the device decides for
    assert json.dumps(again["models"]) == json.dumps(first["models"])
    with pytest.raises(AssertionError, match="trained again"):
        run("--set", "classification.full_learning_rate=0.005")
    with pytest.raises(AssertionError, match="trained again"):
        run("--split-seeds", "1")
    monkeypatch.setattr("src.precision.best_precision", lambda: "bf16")
    with pytest.raises(AssertionError, match="trained again"):
        run("--set", "classification.precision=auto")


def test_folds_are_drawn_several_times(run, tmp_path, monkeypatch):
    """One draw is luck: over several, each text must be judged once in each, and a draw run alone must be the same draw."""
    report = run("--split-seeds", "0,2", "--models", "tfidf_svm,pretrained_head", "--output", str(tmp_path / "drawn.json"))
    assert {path.name for path in tmp_path.glob("drawn*.png")} == {"drawn.png", "drawn_by_length.png", "drawn_reliability.png"}
    assert (report["folds"], report["split_seeds"]) == (4, [0, 2])
    for entry in report["models"]:
        assert [fold["fold"] for fold in entry["folds"]] == [0, 1, 4, 5]
        assert np.sum(entry["confusion"]) == sum(fold["rows"] for fold in entry["folds"]) == 2 * entry["rows"] == 2 * report["rows"]
        assert entry["accuracy"] == pytest.approx(np.mean([draw["accuracy"] for draw in entry["draws"]]))
        assert sum(group["rows"] for group in entry["by_length"]) == 2 * entry["rows"]
    monkeypatch.setattr(cross_validation, "finetune", refuse)
    alone = {draw: run("--split-seeds", draw, "--models", "tfidf_svm,pretrained_head") for draw in ("0", "2")}
    for index, entry in enumerate(report["models"]):
        ones = [one["models"][index] for one in alone.values()]
        assert [draw["accuracy"] for draw in entry["draws"]] == [one["accuracy"] for one in ones]
        assert all("draws" not in one and one["rows"] == report["rows"] for one in ones)
    assert alone["0"]["models"][0]["folds"] != alone["2"]["models"][0]["folds"]
    with pytest.raises(compare.ComparisonError, match="no folds to draw"):
        run("--split-seeds", "0,1", "--validation", "sample")


def test_a_job_is_named_by_what_it_takes_from_the_base(run, base, tmp_path, monkeypatch):
    """Other weights make every model another one but the control, which costs hours to train again; another tokenizer makes that too."""
    other = Path(shutil.copytree(base, tmp_path / "other"))
    model = T5ForConditionalGeneration.from_pretrained(other)
    model.shared.weight.data.mul_(2)
    model.save_pretrained(other)
    run("--models", "random_init,pretrained_head")
    monkeypatch.setattr(cross_validation, "finetune", refuse)
    run("--models", "random_init", "--base", str(other))
    with pytest.raises(AssertionError, match="trained again"):
        run("--models", "pretrained_head", "--base", str(other))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(AssertionError, match="trained again"):
        run("--models", "random_init", "--base", str(other))


def test_jobs_side_by_side_are_the_same_jobs(run, tmp_path, monkeypatch, capfd):
    """A job that another process named or trained otherwise would be done again, or be another model."""
    options = ("--models", "tfidf_svm,random_init,pretrained_head", "--rates", "1,2", "--fractions", "0.5")
    with monkeypatch.context() as patched:
        patched.setattr(cross_validation, "finetune", refuse)  # in this process only: all is done by the others
        found = run(*options, "--processes", "2")["models"]
    assert "tokens/s" not in capfd.readouterr().out
    monkeypatch.setenv("ARTIFACTS_DIR", str(tmp_path / "one process"))
    expected = run(*options)["models"]
    for key in ("rows", "accuracy", "macro_f1", "ece"):
        assert [model[key] for model in found] == pytest.approx([model[key] for model in expected], abs=1e-3), key


def test_texts_that_lose_their_end_are_told_of_once(run, recwarn):
    """Said for every fold of every model it would drown what else there is to read."""
    run("--models", "pretrained_head", "--set", "classification.inputs_length=16")
    assert len([warning for warning in recwarn if issubclass(warning.category, TextsCutWarning)]) == 1  # of two folds


def test_an_interrupted_comparison_goes_on_at_its_fold(run, monkeypatch):
    """Of two folds the first is done when the second is cut off: only the second may be run again."""
    finetune, done = cross_validation.finetune, []

    def cut(*arguments, **options):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(options["fold"])
        return finetune(*arguments, **options)

    monkeypatch.setattr(cross_validation, "finetune", cut)
    with pytest.raises(KeyboardInterrupt):
        run("--models", "pretrained_head")

    def count(*arguments, **options):
        done.append(options["fold"])
        return finetune(*arguments, **options)

    monkeypatch.setattr(cross_validation, "finetune", count)
    run("--models", "pretrained_head")
    assert done == [0, 1]


def test_published_split_is_judged_whole_and_without_what_train_holds(run, tmp_path):
    """A text that stands in train and in the published split is known by heart: the score without such texts must be told too."""
    rows = pd.DataFrame(sample_sentences()[:240]).drop_duplicates("text")
    near = rows.iloc[7:9].assign(text=[f"{text} Again." for text in rows["text"].iloc[7:9]])
    names = {0: "bullish", 1: "neutral", 2: "bearish"}
    rows["label"] = rows["label"].map(names)
    near["label"] = near["label"].map(names)
    train, test = rows.iloc[:160], pd.concat([rows.iloc[160:], rows.iloc[:7], near, rows.iloc[160:161]])
    train.to_csv(tmp_path / "train.csv", index=False)
    test.to_csv(tmp_path / "validation.csv", index=False)
    options = ("--labelled", str(tmp_path / "train.csv"), "--validation", str(tmp_path / "validation.csv"), "--models", "tfidf_svm")
    report = run(*options, "--output", str(tmp_path / "results" / "published.json"))
    model = report["models"][0]
    assert model["rows"] == len(test)
    rows.iloc[160:].to_csv(tmp_path / "validation.csv", index=False)  # the sample has some near duplicates of its own
    others = run(*options)["models"][0]
    assert len(rows) - 160 > others["without_overlap"]["rows"] > 60
    own = len(rows) - 160 - others["without_overlap"]["rows"]
    assert model["without_overlap"]["rows"] == len(test) - 7 - 2 - own
    assert model["without_repeated"]["rows"] == len(test) - 7
    saved = json.loads((tmp_path / "results" / "published.json").read_text())
    assert saved["models"][0]["accuracy"] == model["accuracy"]
    assert len(saved["data_sha256"]) == 64
    assert (tmp_path / "results" / "published.png").stat().st_size > 1_000


def test_the_temperature_of_several_seeds_is_fitted_on_their_average(run, monkeypatch):
    """Averaged probabilities are less sure than each seed's: scaled by the temperature of one seed they come out too unsure."""
    results, given, run_jobs, evaluate = {}, [], compare.run_jobs, comparison_report.evaluate_predictions
    monkeypatch.setattr(compare, "run_jobs", lambda *a, **o: results.setdefault(a[1], run_jobs(*a, **o)))
    monkeypatch.setattr(comparison_report, "evaluate_predictions", lambda *a, **o: given.append(a[1:]) or evaluate(*a, **o))
    run("--models", "pretrained_head", "--seeds", "0,1")
    (validation,) = next(rest for rest in given if rest)
    frames = [pd.concat([r.validation for r in results["pretrained_head"] if r.job.seed == seed]) for seed in (0, 1)]
    expected = np.mean([frame.sort_values(["fold", "text_id"])[list(PROBABILITY_COLUMNS)] for frame in frames], axis=0)
    found = validation.sort_values(["fold", "text_id"])[list(PROBABILITY_COLUMNS)]
    assert np.allclose(found, expected)
    assert not np.allclose(found, frames[0].sort_values(["fold", "text_id"])[list(PROBABILITY_COLUMNS)])


def test_near_duplicates_shape_a_job(run, tmp_path, monkeypatch):
    """The training rows that choose the weights are drawn by groups: with other groups, the same rows are another job."""
    rows = pd.DataFrame(sample_sentences()[:240]).drop_duplicates("text")
    rows["label"] = rows["label"].map({0: "bullish", 1: "neutral", 2: "bearish"})
    rows.iloc[:160].to_csv(tmp_path / "train.csv", index=False)
    rows.iloc[160:].to_csv(tmp_path / "validation.csv", index=False)
    options = ["--labelled", str(tmp_path / "train.csv"), "--validation", str(tmp_path / "validation.csv"), "--models", "random_init"]
    run(*options)
    monkeypatch.setattr(cross_validation, "finetune", refuse)
    run(*options)
    with pytest.raises(AssertionError, match="trained again"):
        run(*options, "--set", "labelled.near_duplicate_threshold=0.3")


def test_label_efficiency_curve(run, tmp_path):
    """The curve needs every model at every share, with intervals in the right order."""
    models = ["tfidf_svm", "random_init", "pretrained_head", "text_to_text"]
    options = ("--models", f"majority,{','.join(models)}", "--fractions", "1,0.25", "--set", "text_to_text.max_steps=2")
    report = run(*options, "--output", str(tmp_path / "curve.json"))
    points = {(point["fraction"], point["model"]): point for point in report["fractions"]}
    assert list(points) == [(fraction, model) for fraction in (0.25, 1.0) for model in models]
    assert all(point["low"] <= point["macro_f1"] <= point["high"] for point in points.values())
    assert [points[1.0, model]["macro_f1"] for model in models] == [model["macro_f1"] for model in report["models"][1:]]
    assert (tmp_path / "curve_label_efficiency.png").exists()


def test_the_learning_rate_is_chosen_on_validation_rows_alone(run, monkeypatch):
    """A rate chosen by its score on the test rows makes that score a promise nobody can keep."""
    finetune, calls = cross_validation.finetune, []

    def watched(task, folder, splits, settings, *arguments, **options):
        calls.append((settings.learning_rate, {name: set(rows["text_id"]) for name, rows in splits.items()}))
        return finetune(task, folder, splits, settings, *arguments, **options)

    monkeypatch.setattr(cross_validation, "finetune", watched)
    options = ("--set", "classification.max_steps=8", "--set", "classification.full_learning_rate=0.02")
    entry = run("--models", "pretrained_head", "--rates", "5e-8,1", *options)["models"][0]
    choosing, judging = calls[:4], calls[4:]
    assert [rate for rate, _ in choosing] == [1e-9, 1e-9, 2e-2, 2e-2]
    assert all(splits["test"] == splits["validation"] for _, splits in choosing)
    scores = entry["validation_macro_f1_by_rate"]
    assert scores["0.02"] > scores["1e-09"]
    assert entry["learning_rate"] == 2e-2
    assert [rate for rate, _ in judging] == [2e-2, 2e-2]
    assert not any(splits["test"] & splits["validation"] for _, splits in judging)


def test_the_control_learns_its_embeddings_at_the_full_rate(run, monkeypatch):
    """A control held back by what protects pre-trained embeddings makes pre-training look better than it is."""
    finetune, rates = cross_validation.finetune, {}

    def watched(task, folder, splits, settings, *arguments, **options):
        rates.setdefault(options["name"], set()).add((settings.method, settings.learning_rate, settings.other_rate))
        return finetune(task, folder, splits, settings, *arguments, **options)

    monkeypatch.setattr(cross_validation, "finetune", watched)
    run("--models", "random_init,pretrained_head", "--set", "classification.other_rate=0.25")
    rate = settings_for("sample").classification.full_learning_rate
    assert rates == {"random_init": {("full", rate, 1.0)}, "pretrained_head": {("full", rate, 0.25)}}


def test_a_model_may_be_the_average_of_others(run):
    """Averaged over the wrong seeds or folds, or by labels, the sum of two models is no model; and what it cost is what both cost."""
    report = run("--models", "majority,pretrained_head+tfidf_svm", "--seeds", "0,1")
    entries = {entry["name"]: entry for entry in report["models"]}
    assert list(entries) == ["majority", "pretrained_head", "tfidf_svm", "pretrained_head+tfidf_svm"]
    both = entries["pretrained_head+tfidf_svm"]
    assert [one["seed"] for one in both["runs"]] == [0, 1]
    assert both["seconds"] == entries["pretrained_head"]["seconds"]
    assert "temperature" not in both  # nothing was held out from TF-IDF
    pairs = [(pair["first"], pair["second"]) for pair in report["comparisons"]]
    assert pairs == [
        ("pretrained_head", "tfidf_svm"),
        ("pretrained_head+tfidf_svm", "tfidf_svm"),
        ("pretrained_head+tfidf_svm", "pretrained_head"),
    ]


def test_an_average_is_of_the_same_fold_and_seed():
    """Worked figures: two seeds of one model and one of another, over two folds."""

    def finished(model, fold, seed, bearish):
        rows = pd.DataFrame({"text_id": [f"text{fold}"], "label": [0]})
        frame = predictions_frame(rows, np.array([[bearish, 1 - bearish, 0.0]]), model, fold=fold)
        costs = {"parameters": 1.0, "trainable": 1.0, "seconds": 10.0, "mebibytes": 4.0 + seed}
        return cross_validation.Finished(cross_validation.Job(model, fold, seed), frame, frame, None, costs)

    given = {
        "a": [finished("a", fold, 0, value) for fold, value in ((0, 0.4), (1, 0.6))],
        "b": [finished("b", fold, seed, value) for fold, seed, value in ((1, 1, 0.1), (0, 1, 0.2), (1, 0, 0.8), (0, 0, 1.0))],
    }
    found = comparison_report.joint("a+b", given)
    together = {(one.job.fold, one.job.seed): one for one in found}
    bearish = {key: one.test["p_bearish"].item() for key, one in together.items()}
    assert bearish == pytest.approx({(1, 1): 0.35, (0, 1): 0.3, (1, 0): 0.7, (0, 0): 0.7})
    assert together[0, 0].test["prediction"].item() == 0
    assert together[1, 1].validation["p_bearish"].item() == pytest.approx(0.35)
    assert together[1, 1].costs == {"parameters": 2.0, "trainable": 2.0, "seconds": 20.0, "mebibytes": 5.0}
    free = [cross_validation.Finished(one.job, one.test, None, None, {}) for one in given["a"]]
    (alone, _) = comparison_report.joint("a+b", {"a": free, "b": given["b"][2:]})  # a baseline named first costs nothing, and hides no cost
    assert alone.costs["seconds"] == 10.0
    assert alone.validation is None


def test_free_generation_is_reported_beside_the_likelihoods(run):
    """A text-to-text model that seldom writes a label can still rank the three: its likelihoods alone would hide that."""
    entry = run("--models", "text_to_text", "--set", "text_to_text.max_steps=2", "--seeds", "0,1")["models"][0]
    assert [one["seed"] for one in entry["generated"]] == [0, 1]
    assert entry["generated"][0]["invalid_rate"] > 0.9  # two steps teach no word
    assert entry["invalid_rate"] == 0
    assert run("--models", "pretrained_head")["models"][0].get("generated") is None


def test_an_adapted_base_has_read_the_training_texts_alone(run, base, tmp_path, monkeypatch):
    """Span corruption on the texts to be judged would make the score a promise nobody can keep, even without their labels."""
    adapt, finetune, read, calls = cross_validation.adapted_checkpoint, cross_validation.finetune, [], []

    def watched_adaptation(folder, texts, validation, *arguments):
        read.append(set(texts) | set(validation))
        return adapt(folder, texts, validation, *arguments)

    def watched(task, folder, splits, *arguments, **options):
        calls.append((folder, set(splits["test"]["text"]), load_file(folder / "model.safetensors")["shared.weight"]))
        return finetune(task, folder, splits, *arguments, **options)

    monkeypatch.setattr(cross_validation, "adapted_checkpoint", watched_adaptation)
    monkeypatch.setattr(cross_validation, "finetune", watched)
    steps = ("--set", "adaptation.max_steps=3", "--set", "classification.max_steps=2", "--seeds", "0,1")
    report = run("--models", "pretrained_head,pretrained_head_adapted", *steps)
    assert [entry["name"] for entry in report["models"]] == ["pretrained_head", "pretrained_head_adapted"]
    plain, adapted = calls[:4], calls[4:]
    assert len(read) == len(adapted) == 4
    assert not any(texts & test for texts, (_, test, _) in zip(read, adapted, strict=True))
    assert {folder for folder, _, _ in plain} == {base}
    assert len({folder for folder, _, _ in adapted}) == 2  # one a fold, shared by both seeds
    assert not any(torch.equal(weights, plain[0][2]) for _, _, weights in adapted)
    assert not list((tmp_path / "sample" / "comparison" / ".checkpoints").iterdir())


def test_errors_come_before_any_training(run, tmp_path, monkeypatch):
    """A misspelt model or too many folds must not be found out after an hour."""
    monkeypatch.setattr(cross_validation, "finetune", refuse)
    with pytest.raises(compare.ComparisonError, match="model 'pretraned' is unknown: choose from"):
        run("--models", "majority,pretraned")
    with pytest.raises(compare.ComparisonError, match="names a model twice"):
        run("--models", "majority+majority")
    for rates in ("0.3,0", "nan", "1,-1", "inf"):
        with pytest.raises(compare.ComparisonError, match="not positive numbers: give them as"):
            run("--rates", rates)
    with pytest.raises(compare.ComparisonError, match="'-1' are not whole numbers"):
        run("--split-seeds=-1")
    with pytest.raises(SplitError, match="too few"):
        run("--folds", "200")
    with pytest.raises(compare.ComparisonError, match=r"holds no config\.json: name a checkpoint with its tokenizer"):
        run("--base", "results/typo")
    (tmp_path / "config.json").touch()
    with pytest.raises(compare.ComparisonError, match=r"holds no tokenizer\.json: name a checkpoint"):
        run("--base", str(tmp_path))
    with pytest.raises(compare.ComparisonError, match=r"'0\.5' are not whole numbers"):
        run("--seeds", "0.5")
    for fractions, message in (
        ("5", "5 is not a share of the labels: 0.05 is 5 %"),
        ("1,0", "not positive numbers"),
        ("0.001", "too small a share"),
    ):
        with pytest.raises(compare.ComparisonError, match=message):
            run("--fractions", fractions)
    with pytest.raises(compare.ComparisonError, match="draws a curve of tfidf_svm"):
        run("--fractions", "0.5", "--models", "majority,word_list")
    with pytest.raises(SystemExit):
        run("--only-folds", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(QuantisationError, match="pip install bitsandbytes"):
        run("--models", "pretrained_head,pretrained_head_qlora")
