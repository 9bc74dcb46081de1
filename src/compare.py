"""The cross-validated comparison of models: `python -m src.pipeline compare --labelled <path> --folds 10`.

Every model sees the same grouped, stratified folds; scores are taken over all folds together, so each text counts once. Several seeds
are averaged in probability (one model made of several) and each is also listed alone. With `--validation` a published split is
judged instead of folds; with `--rates` each model's learning rate is chosen first, on validation rows alone; with `--fractions` the
label-efficiency curve is drawn as well.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.artifacts import data_digest, installed_versions, open_artifact, published_command
from src.cross_validation import BASELINES, CONTESTANTS, Finished, Job, Runner, folds_of, labelled_rows, rows_digest
from src.display.evaluation import intervals_figure, label_efficiency_figure
from src.environment import machine
from src.evaluation import PROBABILITY_COLUMNS, compare_models, evaluate_predictions, scores_without
from src.finetuning_dataset import check_published_classes
from src.profiles import PROFILES, Settings, artifacts_folder, parse_overrides, settings_for
from src.qlora import base_digest
from src.sources import describe_source

DEFAULT_MODELS = "majority,word_list,tfidf_svm,random_init,pretrained_head,pretrained_head_qlora,text_to_text_qlora"
CURVE_MODELS = ("tfidf_svm", "random_init", "pretrained_head")
REFERENCES = ("tfidf_svm", "random_init")  # what every pre-trained model is compared with

RATE_FOLDS = 2  # the first folds, whose validation rows choose a learning rate

Split = tuple[int, pd.DataFrame, pd.DataFrame]  # fold, rest, test


class ComparisonError(ValueError):
    """A comparison that cannot be made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--labelled", required=True, help="labelled sentences: sample, hub, a Hub id, or a local file or folder")
    parser.add_argument("--validation", help="a published validation split, judged in place of folds")
    parser.add_argument("--text-column")
    parser.add_argument("--label-column")
    parser.add_argument("--label-map", help="meaning of the labels, e.g. 0=bearish,1=bullish,2=neutral")
    parser.add_argument("--profile", default="mini", choices=sorted(PROFILES))
    parser.add_argument("--base", type=Path, help="a T5 checkpoint with its tokenizer, in place of the profile's `pretrained` artifact")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--only-folds", type=int, help="run the first few folds only, for a look")
    parser.add_argument("--models", default=DEFAULT_MODELS, help=f"of {', '.join([*BASELINES, *CONTESTANTS])}")
    parser.add_argument("--seeds", default="0", help="training seeds, e.g. 0,1,2; the folds stay the same")
    parser.add_argument("--rates", help="multiples of a model's learning rate that its own is chosen from, e.g. 0.3,1,3")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--fractions", help="shares of the training labels, e.g. 0.02,0.05,0.1,0.25,0.5,1")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="any other setting")
    parser.add_argument("--output", type=Path, help="JSON file to write; pictures go beside it")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison, write its JSON and pictures, print the table; returns what the JSON holds."""
    models = arguments.models.split(",")
    unknown = [model for model in models if model not in BASELINES and model not in CONTESTANTS]
    if unknown:
        raise ComparisonError(f"model {unknown[0]!r} is unknown: choose from {', '.join([*BASELINES, *CONTESTANTS])}")
    settings = settings_of(arguments)
    splits = list(splits_of(arguments, settings))
    data = rows_digest(*(part for _, *parts in splits for part in parts))
    base = arguments.base or open_artifact(settings, "pretrained").path
    folder = artifacts_folder(settings.profile) / "comparison"
    tasks = {"classification": settings.classification, "text_to_text": settings.text_to_text}
    runner = Runner(folder, base, tasks, settings.adaptation, arguments.split_seed)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rates = choose_rates(runner, models, splits, seeds[0], numbers(arguments.rates))
    finished = {model: run_jobs(runner, model, splits, seeds, learning_rate=rates.get(model, {}).get("learning_rate")) for model in models}
    report = report_of(finished, splits)
    for entry in report["models"]:
        entry |= rates.get(entry["name"], {})
    if arguments.fractions:
        report["fractions"] = label_efficiency(runner, finished, splits, numbers(arguments.fractions))
    report |= {"rows": sum(len(test) for _, _, test in splits), "folds": len(splits), "seeds": seeds, "seed": arguments.split_seed}
    report |= {"profile": settings.profile, "base_sha256": base_digest(base), "split_sha256": data}
    report |= {"command": published_command("src.pipeline", sys.argv[1:])}
    sources = [source for path in (arguments.labelled, arguments.validation) if path for source in describe_source(path, labelled=True)]
    report |= {"data_sha256": data_digest(sources) or data, "packages": installed_versions(), "machine": machine()}
    write_report(report, arguments.output)
    return report


def settings_of(arguments: argparse.Namespace) -> Settings:
    overrides: dict[str, Any] = {}
    for option in ("text_column", "label_column", "label_map"):
        if value := getattr(arguments, option):
            overrides[f"labelled.{option}"] = value
    return settings_for(arguments.profile, overrides | parse_overrides(arguments.set))


def splits_of(arguments: argparse.Namespace, settings: Settings) -> Iterator[Split]:
    """The folds, or the published split as the only one, its texts that also stand in the training rows marked `overlap`."""
    if not arguments.validation:
        rows = labelled_rows(arguments.labelled, settings.labelled)
        for fold, (rest, test) in enumerate(folds_of(rows, arguments.folds, arguments.split_seed)):
            if arguments.only_folds is None or fold < arguments.only_folds:
                yield fold, rest, test.assign(overlap=False)
        return
    train = labelled_rows(arguments.labelled, settings.labelled)
    test = labelled_rows(arguments.validation, settings.labelled, published=True)
    check_published_classes(test)
    yield 0, train, test.assign(overlap=test["key"].isin(set(train["key"])))


def numbers(text: str | None) -> list[float]:
    return [float(part) for part in text.split(",")] if text else []


def choose_rates(
    runner: Runner, models: Sequence[str], splits: Sequence[Split], seed: int, multiples: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """For each fine-tuned model the learning rate with the best macro-F1 on validation rows of the first folds, and all those scores.

    Multiples of a model's own rate, because a rate for adapters means nothing for full weights.
    """
    chosen = {}
    for model in (model for model in models if multiples and model in CONTESTANTS):
        own, scores = runner.settings_of(Job(model, 0, seed)).learning_rate, {}
        for rate in (own * multiple for multiple in multiples):
            done = run_jobs(runner, model, splits[:RATE_FOLDS], [seed], learning_rate=rate, judged="validation")
            scores[rate] = evaluate_predictions(pd.concat([result.test for result in done]), resamples=1)["macro_f1"]
        best = max(scores, key=scores.__getitem__)
        chosen[model] = {"learning_rate": best, "validation_macro_f1_by_rate": {f"{rate:g}": score for rate, score in scores.items()}}
    return chosen


def run_jobs(runner: Runner, model: str, splits: Sequence[Split], seeds: Sequence[int], **changes: Any) -> list[Finished]:
    """All jobs of one model, with `changes` to each `Job`; one line is printed for each fold and seed."""
    done = []
    for seed in seeds if model in CONTESTANTS else seeds[:1]:
        for fold, rest, test in splits:
            job = Job(model, fold, seed, **changes)
            result = runner.run(job, rest, test)
            right = float((result.test["prediction"] == result.test["label"]).mean())
            about = "" if job.fraction == 1 else f", {job.fraction:.0%} of the labels"
            about += "" if job.learning_rate is None else f", learning rate {job.learning_rate:g}"
            print(f"{model}: fold {fold + 1}/{len(splits)}, seed {seed}{about}: {job.judged} accuracy {right:.3f}", flush=True)
            done.append(result)
    return done


def pooled(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Predictions of several seeds on the same rows as one: probabilities averaged, the most probable label chosen."""
    together = pd.concat(frames, ignore_index=True)
    if not together.duplicated(["text_id", "fold"]).any():
        return together  # one seed: its own predictions, which a baseline may take elsewhere than from the probabilities
    mean = together.groupby(["fold", "text_id"], sort=False)[list(PROBABILITY_COLUMNS)].mean().reset_index()
    kept = together.drop_duplicates(["fold", "text_id"])[["text_id", "label", "fold", "model"]].merge(mean, on=["fold", "text_id"])
    return kept.assign(prediction=kept[list(PROBABILITY_COLUMNS)].to_numpy().argmax(1))


def report_of(finished: Mapping[str, Sequence[Finished]], splits: Sequence[Split]) -> dict[str, Any]:
    """Scores of every model and the paired comparisons that matter."""
    predictions = {model: pooled([result.test for result in results]) for model, results in finished.items()}
    overlap = {text_id for _, _, test in splits for text_id in test.loc[test["overlap"], "text_id"]}
    models = []
    for model, results in finished.items():
        validation = [result.validation for result in results if result.validation is not None]
        entry = {"name": model, **evaluate_predictions(predictions[model], pooled(validation) if validation else None)}
        entry |= {key: float(np.mean([result.costs[key] for result in results])) for key in results[0].costs}
        entry["runs"] = runs_of([result.test for result in results], [result.job.seed for result in results])
        if generated := [result for result in results if result.generated is not None]:
            entry["generated"] = runs_of([result.generated for result in generated], [result.job.seed for result in generated])
        if overlap and (rest := scores_without(predictions[model], overlap)):
            entry["without_overlap"] = {key: rest[key] for key in ("rows", "accuracy", "macro_f1", "accuracy_ci95")}
        models.append(entry)
    pairs = [
        (model, other) for model in predictions for other in REFERENCES if model in CONTESTANTS and other in predictions and model != other
    ]
    return {"models": models, "comparisons": [compare_models(predictions[first], predictions[second]) for first, second in pairs]}


def runs_of(frames: Sequence[pd.DataFrame], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Scores of each seed alone, all its folds together."""
    runs = []
    for seed in sorted(set(seeds)):
        scores = evaluate_predictions(pd.concat([frame for frame, its in zip(frames, seeds, strict=True) if its == seed]), resamples=1)
        runs.append({"seed": seed, **{key: scores[key] for key in ("accuracy", "macro_f1", "invalid_rate")}})
    return runs


def label_efficiency(
    runner: Runner, finished: Mapping[str, Sequence[Finished]], splits: Sequence[Split], fractions: Sequence[float]
) -> list[dict[str, Any]]:
    """Macro-F1 with its interval for each share of the training labels, at the rates and seeds of `finished`: what pre-training saves."""
    curve = []
    for fraction in sorted(fractions):
        for model in (model for model in finished if model in CURVE_MODELS):
            jobs = [result.job for result in finished[model]]
            seeds, rate = sorted({job.seed for job in jobs}), jobs[0].learning_rate
            done = run_jobs(runner, model, splits, seeds, fraction=fraction, learning_rate=rate)
            scores = evaluate_predictions(pooled([result.test for result in done]))
            low, high = scores["macro_f1_ci95"]
            curve.append({"fraction": fraction, "model": model, "accuracy": scores["accuracy"], "macro_f1": scores["macro_f1"]})
            curve[-1] |= {"low": low, "high": high}
    return curve


def write_report(report: Mapping[str, Any], output: Path | None) -> None:
    """The table on standard output; JSON and pictures where asked for."""
    print(f"\n{'model':<28}{'accuracy':>9}{'macro-F1':>10}  95 % of macro-F1")
    for model in sorted(report["models"], key=lambda model: -model["macro_f1"]):
        low, high = model["macro_f1_ci95"]
        print(f"{model['name']:<28}{model['accuracy']:>9.3f}{model['macro_f1']:>10.3f}  {low:.3f} to {high:.3f}")
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    intervals_figure(report["models"]).savefig(output.with_suffix(".png"), dpi=120)
    if report.get("fractions"):
        figure = label_efficiency_figure(pd.DataFrame(report["fractions"]))
        figure.savefig(output.with_name(output.stem + "_label_efficiency.png"), dpi=120)
