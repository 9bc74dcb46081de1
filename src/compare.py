"""The cross-validated comparison of models: `python -m src.pipeline compare --labelled <path> --folds 10`.

Every model sees the same grouped, stratified folds; scores are taken over all folds together, so each text counts once. Of a fold's
labels, sixty or 2 % are held out to fit a fine-tuned model's temperature; the weights judged are those of its last step. Several seeds
are averaged in probability (one model made of several) and each is also listed alone. With `--split-seeds` the folds are drawn several
times: scores are the mean over draws, each is also listed alone, and a text still counts once in an interval. With `--validation` a
published split is judged instead of folds; with `--rates` each model's learning rate is chosen first, on validation rows of the first
folds (rows that other folds judge; with `--validation` they are apart); with `--fractions` the label-efficiency curve is drawn as well.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.artifacts import data_digest, open_artifact, published_command
from src.baselines import BASELINES
from src.comparison_report import joint, report_of, write_report
from src.config import TrainingSettings
from src.cross_validation import (
    BASE_FILES,
    CONTESTANTS,
    VALIDATION,
    Finished,
    Job,
    Runner,
    Split,
    folds_of,
    held_out,
    labelled_rows,
    part_of,
    rows_digest,
)
from src.environment import installed_versions, machine
from src.evaluation import averaged, evaluate_predictions, members_of
from src.finetuning import MODEL_NAMES
from src.finetuning_dataset import check_published_classes, groups_of
from src.precision import precision_of
from src.profiles import Settings, add_settings_options, artifacts_folder, parse_overrides, settings_for
from src.qlora import base_digest, require_bitsandbytes
from src.sources import describe_source
from src.splits import SplitError

DEFAULT_MODELS = "majority,word_list,tfidf_svm,tfidf_word_list_svm,random_init,pretrained_head,pretrained_head_qlora,text_to_text_qlora"
CURVE_MODELS = ("tfidf_svm", "random_init", "pretrained_head", "text_to_text")
RATE_FOLDS = 2  # the first folds, whose validation rows choose a learning rate


class ComparisonError(ValueError):
    """A comparison that cannot be made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--labelled", required=True, help="labelled sentences: sample, hub, a Hub id, or a local file or folder")
    parser.add_argument("--validation", help="a published validation split, judged in place of folds")
    parser.add_argument("--text-column")
    parser.add_argument("--label-column")
    parser.add_argument("--label-map", help="meaning of the labels, e.g. 0=bearish,1=bullish,2=neutral")
    add_settings_options(parser, "mini")
    parser.add_argument("--base", type=Path, help="a T5 checkpoint with its tokenizer, in place of the profile's `pretrained` artifact")
    parser.add_argument("--folds", type=at_least(2), default=10)
    parser.add_argument("--only-folds", type=at_least(1), help="run the first few folds only, for a look")
    parser.add_argument(
        "--models", default=DEFAULT_MODELS, help=f"of {', '.join([*BASELINES, *CONTESTANTS])}; a+b is the average of a and b"
    )
    parser.add_argument("--seeds", default="0", help="training seeds, e.g. 0,1,2; the folds stay the same")
    parser.add_argument("--rates", help="multiples of a model's learning rate that its own is chosen from, e.g. 0.3,1,3")
    parser.add_argument("--split-seeds", default="0", help="draws of the folds, e.g. 0,1,2: each text is then judged once in each draw")
    parser.add_argument("--processes", type=at_least(1), default=1, help="models trained side by side, each on its share of the cores")
    parser.add_argument("--fractions", help="shares of the training labels, e.g. 0.02,0.05,0.1,0.25,0.5,1")
    parser.add_argument("--output", type=Path, help="JSON file to write; pictures go beside it")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison, write its JSON and pictures, print the table; returns what the JSON holds."""
    named = arguments.models.split(",")
    models = list(dict.fromkeys(member for model in named for member in members_of(model)))
    unknown = [model for model in models if model not in BASELINES and model not in CONTESTANTS]
    if unknown:
        raise ComparisonError(f"model {unknown[0]!r} is unknown: choose from {', '.join([*BASELINES, *CONTESTANTS])}")
    if twice := [model for model in named if len(set(members_of(model))) < len(members_of(model))]:
        raise ComparisonError(f"--models {twice[0]} names a model twice: an average is of different ones")
    contestants = [CONTESTANTS[model] for model in models if model in CONTESTANTS]
    if any(contestant.method == "qlora" for contestant in contestants):
        require_bitsandbytes()
    settings, multiples = settings_of(arguments), numbers(arguments.rates)
    splits = list(splits_of(arguments, settings))
    fractions = fractions_of(arguments.fractions, models, splits)
    data = rows_digest(*(part for split in splits for part in (split.rest, split.test)))
    base = arguments.base or (open_artifact(settings, "pretrained").path if contestants else None)
    if lacking := [name for name in BASE_FILES if contestants and not (base / name).is_file()]:
        raise ComparisonError(f"--base {base} holds no {lacking[0]}: name a checkpoint with its tokenizer, such as results/mini_relabelled")
    folder = artifacts_folder(settings.profile) / "comparison"
    tasks = {task: decided(getattr(settings, task)) for task in MODEL_NAMES}
    runner = Runner(folder, base, tasks, decided(settings.adaptation), arguments.processes, splits[0].fold)
    seeds, draws = whole_numbers(arguments.seeds), list(dict.fromkeys(split.draw for split in splits))
    rates = choose_rates(runner, models, splits, seeds[0], multiples)
    plans = [(model, {"learning_rate": rates.get(model, {}).get("learning_rate")}) for model in models]
    finished = dict(zip(models, run_plans(runner, plans, splits, seeds), strict=True))
    finished |= {model: joint(model, finished) for model in named if len(members_of(model)) > 1}
    report = report_of(finished, splits)
    for entry in report["models"]:
        entry |= rates.get(entry["name"], {})
    if fractions:
        report["fractions"] = label_efficiency(runner, finished, splits, seeds, fractions)
    report |= {"rows": report["models"][0]["rows"], "folds": len(splits), "seeds": seeds, "seed": draws[0], "split_seeds": draws}
    report |= {"profile": settings.profile, "base_sha256": base_digest(base) if contestants else None, "split_sha256": data}
    report |= {"command": published_command("src.pipeline", sys.argv[1:])}
    sources = [source for path in (arguments.labelled, arguments.validation) if path for source in describe_source(path, labelled=True)]
    report |= {"data_sha256": data_digest(sources) or data, "packages": installed_versions(), "machine": machine()}
    write_report(report, arguments.output)
    return report


def decided(settings: TrainingSettings) -> Any:
    """With the number format of this device in place of "auto": a job that was done in another one is another job."""
    return replace(settings, precision=precision_of(settings))


def settings_of(arguments: argparse.Namespace) -> Settings:
    overrides: dict[str, Any] = {}
    for option in ("text_column", "label_column", "label_map"):
        if value := getattr(arguments, option):
            overrides[f"labelled.{option}"] = value
    return settings_for(arguments.profile, overrides | parse_overrides(arguments.set))


def splits_of(arguments: argparse.Namespace, settings: Settings) -> Iterator[Split]:
    """The folds of each draw, numbered on from draw to draw, or the published split.

    Its texts are marked: `repeated` where the training rows hold the same text, `overlap` where they hold it or a near duplicate.

    Raises:
        ComparisonError: several draws are asked of a published split.
    """
    rows, draws = labelled_rows(arguments.labelled, settings.labelled), whole_numbers(arguments.split_seeds)
    if not arguments.validation:
        for draw in draws:
            for fold, (rest, test) in enumerate(folds_of(rows, arguments.folds, draw)):
                if arguments.only_folds is None or fold < arguments.only_folds:
                    yield Split(draw, draw * arguments.folds + fold, rest, test.assign(overlap=False, repeated=False))
        return
    if len(draws) > 1:
        raise ComparisonError("a published split has no folds to draw: give one of --split-seeds, or several --seeds")
    test = labelled_rows(arguments.validation, settings.labelled, published=True)
    check_published_classes(test)
    groups = groups_of(pd.concat([rows["text"], test["text"]]), settings.labelled)
    repeated = test["key"].isin(set(rows["key"]))
    overlap = repeated | np.isin(groups[len(rows) :], groups[: len(rows)])
    yield Split(draws[0], draws[0], rows, test.assign(overlap=overlap, repeated=repeated))


def whole_numbers(text: str) -> list[int]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ComparisonError(f"{text!r} are not whole numbers: give them as 0,1,2")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def numbers(text: str | None) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [float("nan")]
    if not all(0 < number < float("inf") for number in found):
        raise ComparisonError(f"{text!r} are not positive numbers: give them as 0.3,1,3")
    return found


def fractions_of(text: str | None, models: Sequence[str], splits: Sequence[Split]) -> list[float]:
    """The shares of the labels that the curve is drawn for, each of which every split can give."""
    fractions = numbers(text)
    if fractions and not any(model in CURVE_MODELS for model in models):
        raise ComparisonError(f"--fractions draws a curve of {', '.join(CURVE_MODELS)}: name one of them in --models")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ComparisonError(f"--fractions {fraction:g} is not a share of the labels: 0.05 is 5 %")
        for split in splits:
            try:
                held_out(part_of(split.rest, fraction, split.fold)[0], VALIDATION, split.fold)
            except SplitError as error:
                raise ComparisonError(f"--fractions {fraction:g} is too small a share here: {error}") from None
    return fractions


def at_least(least: int) -> Callable[[str], int]:
    """A type of option: a whole number that is not smaller."""

    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return parse


def choose_rates(
    runner: Runner, models: Sequence[str], splits: Sequence[Split], seed: int, multiples: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """For each fine-tuned model the learning rate with the best macro-F1 on validation rows of the first folds, and all those scores.

    Multiples of a model's own rate, because a rate for adapters means nothing for full weights.
    """
    own = {model: runner.settings_of(Job(model, 0, seed)).learning_rate for model in models if model in CONTESTANTS}
    plans = [(model, {"learning_rate": own[model] * multiple, "judged": "validation"}) for model in own for multiple in multiples]
    tried: dict[str, dict[float, float]] = {}
    for (model, changes), done in zip(plans, run_plans(runner, plans, splits[:RATE_FOLDS], [seed]), strict=True):
        scores = evaluate_predictions(pd.concat([result.test for result in done]), resamples=1)
        tried.setdefault(model, {})[changes["learning_rate"]] = scores["macro_f1"]
    return {
        model: {
            "learning_rate": max(scores, key=scores.__getitem__),
            "validation_macro_f1_by_rate": {f"{rate:g}": score for rate, score in scores.items()},
        }
        for model, scores in tried.items()
    }


def run_plans(
    runner: Runner, plans: Sequence[tuple[str, Mapping[str, Any]]], splits: Sequence[Split], seeds: Sequence[int]
) -> list[list[Finished]]:
    """What the jobs of each plan left; a plan is a model and `changes` to its jobs. Those of all plans may run side by side."""
    runner.run_ahead([job for model, changes in plans for job in jobs_of(model, splits, seeds, **changes)])
    return [run_jobs(runner, model, splits, seeds, **changes) for model, changes in plans]


def jobs_of(model: str, splits: Sequence[Split], seeds: Sequence[int], **changes: Any) -> list[tuple[Job, pd.DataFrame, pd.DataFrame]]:
    """All jobs of one model, with `changes` to each `Job`, and their rows: what `Runner.run` takes."""
    seeds = seeds if model in CONTESTANTS else seeds[:1]
    return [(Job(model, split.fold, seed, **changes), split.rest, split.test) for seed in seeds for split in splits]


def run_jobs(runner: Runner, model: str, splits: Sequence[Split], seeds: Sequence[int], **changes: Any) -> list[Finished]:
    """What all jobs of one model left, one after another; one line is printed for each."""
    done = []
    for number, (job, rest, test) in enumerate(jobs_of(model, splits, seeds, **changes)):
        done.append(result := runner.run(job, rest, test))
        right = float((result.test["prediction"] == result.test["label"]).mean())
        about = "" if job.fraction == 1 else f", {100 * job.fraction:g}% of the labels"
        about += "" if job.learning_rate is None else f", learning rate {job.learning_rate:g}"
        fold = f"fold {number % len(splits) + 1}/{len(splits)}"
        print(f"{model}: {fold}, seed {job.seed}{about}: {job.judged} accuracy {right:.3f}", flush=True)
    return done


def label_efficiency(
    runner: Runner, finished: Mapping[str, Sequence[Finished]], splits: Sequence[Split], seeds: Sequence[int], fractions: Sequence[float]
) -> list[dict[str, Any]]:
    """Macro-F1 with its interval for each share of the training labels, at the rates of `finished`: what pre-training saves.

    Below the whole all of them are trained on; the whole is the run of the table, which holds labels out for a temperature.
    """
    rates = {model: results[0].job.learning_rate for model, results in finished.items() if model in CURVE_MODELS}
    plans = [(model, {"fraction": fraction, "learning_rate": rates[model]}) for fraction in sorted(fractions) for model in rates]
    curve = []
    for (model, changes), done in zip(plans, run_plans(runner, plans, splits, seeds), strict=True):
        scores = evaluate_predictions(averaged([result.test for result in done]))
        low, high = scores["macro_f1_ci95"]
        curve.append({"fraction": changes["fraction"], "model": model, "accuracy": scores["accuracy"], "macro_f1": scores["macro_f1"]})
        curve[-1] |= {"low": low, "high": high}
    return curve
